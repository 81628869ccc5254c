"""Workers: none of the trials lost, none trained twice, whoever dies; failures; resuming."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from sweep_files import CONFIG, GRID, FixedChecker, engine, quick, report_of

from lightning_edge.errors import SweepError
from lightning_edge.sweeps.definition import bind, parse_definition
from lightning_edge.sweeps.fit import Fit, InterruptedFitError
from lightning_edge.sweeps.front import read_front
from lightning_edge.sweeps.locks import held
from lightning_edge.sweeps.objectives import TrialFailedError
from lightning_edge.sweeps.study import Result, Study

pytest.importorskip("optuna")

RANGE = """
base: base.yaml
space:
  prune.macs: {low: 0.1, high: 0.9}
  model.init_args.width: [4, 8]
objectives: {tflite.val_acc: max, tflite.size_bytes: min}
trials: 15
"""


def test_a_grid_is_trained_once_each_and_every_point_has_its_files_values(tmp_path: Path) -> None:
    outcome = engine(tmp_path / "sweep", workers=2).run()
    assert outcome.cause is None
    assert not outcome.interrupted
    trials = outcome.front.trials
    assert [(trial.number, trial.status, trial.folder) for trial in trials] == [
        (number, "complete", f"trial-{number:04d}") for number in range(6)
    ]
    assert {tuple(trial.settings.values()) for trial in trials} == {(m, w) for m in (1.0, 0.75, 0.5) for w in (4, 8)}
    for trial in trials:
        expected = int(1000 * trial.settings["prune.macs"] * trial.settings["model.init_args.width"])
        assert trial.values == {
            "val_acc": pytest.approx(0.505 + expected / 20_000),  # of the int8 file, not the network in torch
            "tflite.size_bytes": expected,
        }
        assert trial.feasible == (expected <= 7000)
        assert len((tmp_path / "sweep" / trial.folder / "asked").read_text().splitlines()) == 1
    assert read_front(tmp_path / "sweep") == outcome.front
    # Everything that is feasible is on this front, since size buys accuracy.
    assert [trial.number for trial in trials if trial.front] == [trial.number for trial in trials if trial.feasible]


@pytest.mark.parametrize(
    ("text", "url"),
    [pytest.param(RANGE, None, marks=pytest.mark.slow), (GRID, "sqlite")],
    ids=["tpe-journal", "grid-database"],
)
def test_three_workers_of_which_one_is_killed_lose_nothing(tmp_path: Path, text: str, url: str | None) -> None:
    folder, log, file = tmp_path / "sweep", tmp_path / "log", tmp_path / "study.yaml"
    file.write_text(text)
    address = "" if url is None else f"sqlite:///{tmp_path / 'sweep.db'}"
    command = [
        sys.executable,
        str(Path(__file__).with_name("sweep_files.py")),
        str(folder),
        "0.3",
        str(log),
        address,
        str(file),
    ]
    engine(folder, text, url=address or None)  # the folder is there before they come
    workers = [subprocess.Popen(command) for _ in range(3)]
    try:
        victim = None
        given_up = time.monotonic() + 60
        while victim is None and time.monotonic() < given_up:
            events = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
            begun = Counter(event["worker"] for event in events if event["event"] == "begin")
            ended = Counter(event["worker"] for event in events if event["event"] == "end")
            victim = next((pid for pid in begun if begun[pid] > ended[pid]), None)
            time.sleep(0.01)
        assert victim is not None
        os.kill(victim, signal.SIGKILL)
        assert sorted(worker.wait(timeout=90) for worker in workers) == [-signal.SIGKILL, 0, 0]
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    events = [json.loads(line) for line in log.read_text().splitlines()]
    ended = Counter(event["folder"] for event in events if event["event"] == "end")
    trials = 6 if text == GRID else 15
    assert ended == Counter({f"trial-{number:04d}": 1 for number in range(trials)})
    assert victim not in {event["worker"] for event in events[-3:]}
    front = read_front(folder)
    assert [trial.status for trial in front.trials] == ["complete"] * trials
    assert len({json.dumps(trial.settings) for trial in front.trials}) == trials


def test_a_sweep_that_was_stopped_goes_on_where_it_was(tmp_path: Path) -> None:
    stop = threading.Event()
    asked: list[str] = []

    def stops_at_the_third(fit: Fit) -> dict[str, Any]:
        asked.append(fit.folder.name)
        if len(asked) == 3:
            stop.set()
            raise InterruptedFitError("it was stopped")
        return report_of(fit.config)

    outcome = engine(tmp_path / "sweep", runner=stops_at_the_third, stop=stop).run()
    assert outcome.interrupted
    assert Counter(trial.status for trial in outcome.front.trials) == {"complete": 2, "stopped": 1}
    assert read_front(tmp_path / "sweep") == outcome.front
    (tmp_path / "sweep" / "trial-0002" / "left over").write_text("of the first attempt")

    outcome = engine(tmp_path / "sweep").run()
    assert [trial.status for trial in outcome.front.trials] == ["complete"] * 6
    once = [(tmp_path / "sweep" / f"trial-{number:04d}" / "asked").exists() for number in range(6)]
    assert once == [False, False, True, True, True, True]
    assert not (tmp_path / "sweep" / "trial-0002" / "left over").exists()


def test_a_training_that_outlived_its_worker_is_taken_as_it_is(tmp_path: Path) -> None:
    stop = threading.Event()

    def writes_and_is_cut_off(fit: Fit) -> dict[str, Any]:
        fit.report_path.parent.mkdir()
        fit.report_path.write_text(json.dumps(report_of(fit.config)))
        stop.set()
        raise InterruptedFitError("it was stopped")

    engine(tmp_path / "sweep", runner=writes_and_is_cut_off, stop=stop).run()
    outcome = engine(tmp_path / "sweep").run()
    assert [trial.status for trial in outcome.front.trials] == ["complete"] * 6
    assert not (tmp_path / "sweep" / "trial-0000" / "asked").exists()


def test_more_trials_are_added_to_a_finished_sweep(tmp_path: Path) -> None:
    first = engine(tmp_path / "sweep", RANGE).run().front
    assert len(first.trials) == 15
    more = engine(tmp_path / "sweep", RANGE.replace("trials: 15", "trials: 18")).run().front
    assert list(more.trials[:15]) == [trial if not trial.front else more.trials[trial.number] for trial in first.trials]
    assert len(more.trials) == 18


def test_what_turns_a_phase_off_is_trained_once(tmp_path: Path) -> None:
    text = GRID.replace("model.init_args.width: [4, 8]", "prune.start: [0.1, 0.2]")
    told: list[str] = []
    runs = engine(tmp_path / "sweep", text)
    runs.tell = told.append
    trials = runs.run().front.trials
    assert told[-1].startswith("trial 4 ended; 5 of 5 done, 0 running, 0 failed, best val_acc 0.805 (trial 1)")
    # Where nothing is pruned, it does not matter when.
    assert [tuple(trial.settings.values()) for trial in trials] == [
        *((1.0, 0.1), (0.75, 0.1), (0.75, 0.2), (0.5, 0.1), (0.5, 0.2))
    ]


@pytest.mark.parametrize("sampler", ["random", "tpe", "gp", "nsga2"])
def test_samplers_do_not_repeat_what_was_trained(tmp_path: Path, sampler: str) -> None:
    text = f"{GRID}\nsampler: {sampler}\ntrials: 6\n"
    trials = engine(tmp_path / "sweep", text).run().front.trials
    assert len({json.dumps(trial.settings) for trial in trials}) == 6


def test_seeds_give_means_and_spread(tmp_path: Path) -> None:
    trials = engine(tmp_path / "sweep", f"{GRID}\nseeds: 3\n").run().front.trials
    (trial,) = [trial for trial in trials if trial.settings == {"prune.macs": 0.5, "model.init_args.width": 8}]
    assert trial.values["val_acc"] == pytest.approx(0.5 + 0.2 + 0.006)  # seeds 5, 6 and 7
    assert trial.spread == {"val_acc": pytest.approx(0.001), "tflite.size_bytes": 0.0}
    assert sorted(path.name for path in (tmp_path / "sweep" / trial.folder).iterdir()) == [
        "lock",
        "seed-0",
        "seed-1",
        "seed-2",
    ]


def test_a_trial_that_fails_is_kept_with_its_reason_and_the_others_go_on(tmp_path: Path) -> None:
    def fails_when_small(fit: Fit) -> dict[str, Any]:
        if report_of(fit.config)["rows"][-1]["size_bytes"] == 3000:
            raise TrialFailedError("the loss is nan")
        return quick(fit)

    outcome = engine(tmp_path / "sweep", runner=fails_when_small).run()
    assert outcome.cause is None
    failed = [trial for trial in outcome.front.trials if trial.status == "failed"]
    assert [(trial.reason, trial.values, trial.feasible, trial.front) for trial in failed] == [
        ("the loss is nan", {}, False, False)
    ]
    again = engine(tmp_path / "sweep")
    assert again.study.retry_failed() == 1
    front = again.run().front
    assert [trial.status for trial in front.trials] == ["complete"] * 6
    assert [trial.number for trial in front.trials] == [0, 1, 3, 4, 5, 6]


def test_the_same_failure_again_and_again_ends_the_sweep(tmp_path: Path) -> None:
    def fails(fit: Fit) -> dict[str, Any]:
        raise TrialFailedError(f"no data in folder {fit.folder.name[-1]}")

    outcome = engine(tmp_path / "sweep", runner=fails).run()
    assert outcome.cause == "no data in folder 2"
    assert not outcome.interrupted
    assert [trial.status for trial in outcome.front.trials] == ["failed"] * 3


def test_failures_of_several_causes_do_not_end_it(tmp_path: Path) -> None:
    causes = iter("ABABAB")

    def fails(fit: Fit) -> dict[str, Any]:
        raise TrialFailedError(next(causes))

    outcome = engine(tmp_path / "sweep", runner=fails).run()
    assert outcome.cause is None
    assert len(outcome.front.trials) == 6


def test_a_metric_that_no_training_logs_ends_it_at_once(tmp_path: Path) -> None:
    outcome = engine(tmp_path / "sweep", GRID.replace("val_acc", "val_f1")).run()
    assert "the report of tflite has no val_f1; it has: val_acc" in str(outcome.cause)
    assert len(outcome.front.trials) == 1


def test_workers_share_the_cores_that_this_process_may_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(7)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 64)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    given: list[Any] = []

    def noted(fit: Fit) -> dict[str, Any]:
        given.append(dict(fit.environment))
        return quick(fit)

    engine(tmp_path / "sweep", runner=noted, workers=2).run()
    assert given == [{"OMP_NUM_THREADS": "3"}] * 6


def test_what_goes_wrong_outside_of_a_trial_is_raised(tmp_path: Path) -> None:
    def breaks(fit: Fit) -> dict[str, Any]:
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        engine(tmp_path / "sweep", runner=breaks, workers=2).run()


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("[4, 8]", "[4, 16]", "its space"),
        ("val_acc: max", "val_acc: min", "its objectives"),
        ("3.5", "4.5", "its constraints"),
        ("base.yaml", "other.yaml", "its base"),
    ],
)
def test_a_folder_of_another_sweep_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    engine(tmp_path / "sweep").run()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(SweepError, match=told):
        engine(tmp_path / "sweep", GRID.replace(old, new))
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_database_with_another_sweep_is_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'sweep.db'}"
    engine(tmp_path / "one", url=url)
    with pytest.raises(SweepError, match=r"its space is .* rename the sweep file"):
        engine(tmp_path / "two", GRID.replace("[4, 8]", "[4, 16]"), url=url)


def test_another_machine_takes_over_what_nobody_speaks_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_edge.sweeps.storage.BEAT_S", 1)
    monkeypatch.setattr("lightning_edge.sweeps.storage.SILENCE_S", 2)
    url = f"sqlite:///{tmp_path / 'sweep.db'}"
    lost = engine(tmp_path / "lost", url=url).study.claim()
    assert lost is not None
    front = engine(tmp_path / "other", url=url).run().front
    assert [trial.status for trial in front.trials] == ["complete"] * 6
    assert [trial.number for trial in front.trials] == [1, 2, 3, 4, 5, 6]
    assert front.trials[-1].settings == lost.settings
    # It comes back too late: what it gives is not wanted any more, and nothing of its folder is taken up.
    lost.lock.close()
    late = engine(tmp_path / "lost", url=url)
    assert not late.study.complete(
        lost, Result({"val_acc": 1.0, "tflite.size_bytes": 1, "tflite.p95_ms": 1}, None, 1.0)
    )
    assert late.run().front.trials == front.trials


def test_a_storage_that_breaks_is_one_clear_error(tmp_path: Path) -> None:
    file = tmp_path / "sweep.db"

    def breaks(fit: Fit) -> dict[str, Any]:
        file.write_bytes(b"no database" * 1000)
        return report_of(fit.config)

    with pytest.raises(SweepError, match=r"the storage of the study does not answer any more: .*run the sweep again"):
        engine(tmp_path / "sweep", runner=breaks, url=f"sqlite:///{file}").run()


def test_a_base_that_has_changed_is_told(tmp_path: Path) -> None:
    first = engine(tmp_path / "sweep")
    assert not first.study.base_changed
    assert not engine(tmp_path / "sweep").study.base_changed
    config = {**CONFIG, "seed_everything": 6}
    sweep = bind(parse_definition(GRID, Path("study.yaml")), FixedChecker(config))
    assert Study(sweep, tmp_path / "sweep").base_changed


@pytest.mark.parametrize(
    "url", ["nonsense", "sqlite:////nowhere/at/all.db", "postgresql://user:secret@127.0.0.1:9/x", "foo://x"]
)
def test_a_storage_that_cannot_be_reached_is_one_clear_error(tmp_path: Path, url: str) -> None:
    with pytest.raises(SweepError, match=r"--storage .*it cannot be used.*Allowed: a database") as told:
        engine(tmp_path / "sweep", url=url)
    assert "secret" not in str(told.value)
    assert not any(tmp_path.iterdir())


def test_a_folder_that_another_process_is_making_is_waited_for(tmp_path: Path) -> None:
    folder, opened = tmp_path / "sweep", list[Any]()
    engine(folder)
    copy, aside = folder / "sweep.yaml", tmp_path / "aside"
    with held(folder / "sweep.lock"):
        copy.rename(aside)  # the journal is there, and the copy of the sweep file is not yet
        second = threading.Thread(target=lambda: opened.append(engine(folder)), daemon=True)
        second.start()
        second.join(0.3)
        assert second.is_alive()
        aside.rename(copy)
    second.join(60)
    assert len(opened) == 1


def test_a_process_that_is_killed_before_the_copy_is_written_leaves_a_folder_to_go_on_in(tmp_path: Path) -> None:
    killed = """
import os, sys
from pathlib import Path
from lightning_edge.files import StagedPath
from sweep_files import engine
StagedPath.accept = lambda self: os.kill(os.getpid(), 9)
engine(Path(sys.argv[1]))
"""
    folder = tmp_path / "sweep"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    ended = subprocess.run([sys.executable, "-c", killed, str(folder)], env=environment, timeout=120)
    assert ended.returncode == -signal.SIGKILL
    left = [path.name for path in folder.iterdir()]
    assert "sweep.yaml" not in left
    assert any(name.startswith(".staging-") for name in left)
    assert "journal.log" in left
    assert len(engine(folder).run().front.trials) == 6
    assert not [path for path in folder.iterdir() if path.name.startswith(".staging-")]
    # The journal says whose it is.
    (folder / "sweep.yaml").unlink()
    for path in folder.glob("trial-*"):
        path.rename(tmp_path / path.name)
    for name in ("folder-id", "front.json"):
        (folder / name).unlink(missing_ok=True)
    with pytest.raises(SweepError, match="its space is"):
        engine(folder, GRID.replace("0.75, ", ""))


def test_trials_of_another_storage_are_not_overwritten(tmp_path: Path) -> None:
    engine(tmp_path / "sweep").run()
    with pytest.raises(SweepError, match="trial-0000 is of a study in another storage"):
        engine(tmp_path / "sweep", url=f"sqlite:///{tmp_path / 'sweep.db'}")
    (tmp_path / "sweep" / "journal.log").unlink()
    with pytest.raises(SweepError, match="trial-0000 is of a study in another storage"):
        engine(tmp_path / "sweep")
    assert (tmp_path / "sweep" / "trial-0000" / "asked").exists()


def test_a_folder_with_other_files_is_refused(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").write_bytes(b"")
    with pytest.raises(SweepError, match="holds other files"):
        engine(tmp_path)
    with pytest.raises(SweepError, match="is a file"):
        engine(tmp_path / "photo.jpg")
