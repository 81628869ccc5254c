"""The pages of reports: what is on them, and that nothing which comes from outside is ever markup."""

from __future__ import annotations

import math
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from pages import FLOAT, HOSTILE, INT8, LONG, OVER, REPORT, REPORTS, TORCH, front, read, trial, words

from lightning_edge.reporting.classes import ClassChanges
from lightning_edge.reporting.html import comparison_page, report_page, sweep_page, sweep_svg
from lightning_edge.reporting.html.choice import choose_file
from lightning_edge.reporting.html.markup import Markup, file_link, join, link, tag, text
from lightning_edge.reporting.html.page import state
from lightning_edge.reporting.network_size import NetworkSize
from lightning_edge.reporting.provenance import Commit
from lightning_edge.reporting.report import Row


@pytest.mark.parametrize("name", REPORTS)
def test_every_report_has_a_whole_page_of_its_own(name: str) -> None:
    page = report_page(REPORTS[name], recipe=HOSTILE if name == "hostile" else "model: x")
    reader = read(page)
    assert reader.links == []
    assert "default-src 'none'" in page.replace("&#x27;", "'")
    page.encode()


def test_names_are_never_markup() -> None:
    page = report_page(REPORTS["hostile"], recipe=HOSTILE, commit=Commit(HOSTILE, True))
    assert page.count("<script") == page.count("<img") == 0
    assert "&lt;script&gt;alert(1)" in page
    # What was escaped before it came is escaped once more, and not taken for markup.
    assert "&amp;amp;" in page
    assert not re.search("[\x00\u202e\ud800]", page)


def test_headline_says_what_to_ship_against_what() -> None:
    found = words(report_page(REPORT))
    assert "Digits is a network of 12,058 parameters. To ship: tflite int8 (quantized in training)" in found
    assert "Against tflite fp32: 3.1 times smaller, val_acc 0.02 better, 2.5 times faster." in found
    assert "16,000 tflite fp32: 50,000" in found
    assert "1 ready" in found
    assert "1 for comparison" in found


def test_page_tells_what_the_report_knows() -> None:
    found = words(report_page(REPORT, "seed_everything: 0", Commit("abc123", False)))
    for told in (
        "0.2 · 0.4 · 0.9 ms",
        "0.1 · 1 · 2 steps",
        "78.9% of the MACs delegated",
        "1 x TANH",
        "softmax",
        "270,000",
        "done so",
        "latency of one sample: 10 warm-up calls, 100 timed, 1 thread",
        "post-training quantization from 32 batches",
        "seed 0",
        "commit abc123",
        "seed_everything: 0",
        "2.13.0",
    ):
        assert told in found, told


def test_page_tells_what_was_measured_on_devices() -> None:
    page = report_page(REPORTS["devices"])
    found = words(page)
    for told in (
        "Failed: away: tflite int8: refused the connection",
        "pi4: tflite int8 0.9700 close",
        "pi4: tflite int8, energy: 2.5 mJ an inference; RAPL, package-0: 3 J",
        "p50 1.011 ms at first, 1.606 ms at the end of 60 s, 40 to 47 °C",
        "pi4: tflite int8 0.125 2.500 0.250 21.00%",
        "pi4: tflite int8 64 - 1.00 - - +0.0000 -0.0100",
        "Median latency of a sample, one call after another",
        "The hottest temperature",
        "pi5: tflite int8, 60 s: 1.667 ms",
    ):
        assert told in found, told
    assert "The fastest core" not in found  # no device told it
    assert page.count("<polyline") - report_page(REPORT).count("<polyline") == 4
    assert "On devices" not in words(report_page(REPORT))


def test_trouble_comes_before_the_pictures() -> None:
    for name, told in (
        ("failed", "coreml int8 (quantized in training) failed: no such operation: roll"),
        ("not run", "executorch int8 (quantized in training) was not run here: needs an NPU"),
        (
            "over budget",
            "onnx int8 (quantized in training) is over its budget: size_bytes 16,000 is 6,000 above 10,000",
        ),
    ):
        found = words(report_page(REPORTS[name]))
        assert told in found
        assert found.index(told) < found.index("What each file costs")
    assert "No file can ship as it is." in words(report_page(REPORTS["all failed"]))
    assert "No file can ship as it is." in words(report_page(REPORTS["over budget"]))
    assert "There are no files." in words(report_page(REPORTS["no rows"]))
    assert "Look at this first" not in report_page(REPORT)


def test_a_warning_of_a_budget_is_told_once() -> None:
    told = f"{OVER.label} is over its budget: {OVER.budget}"
    assert report_page(replace(REPORTS["over budget"], warnings=(told,))).count(told) == 1


def test_pictures_without_metrics_are_of_size_and_latency() -> None:
    found = words(report_page(REPORTS["no metrics"]))
    assert "Latency against size" in found
    assert "val_acc" not in found


def test_channels_before_and_after_are_told_by_layer() -> None:
    assert "What was cut" not in report_page(REPORT)
    found = words(report_page(REPORTS["pruned"]))
    assert "stem.0 12 of 16" in found
    assert "Layer Channels before Now stem.0 16 12 head 64 8" in found
    deep = words(report_page(REPORTS["pruned deep"]))
    assert "the first 24 of 400 layers" in deep
    assert "250 more layers are in report.json" in deep


def test_bytes_and_sensitivity_are_told_by_layer() -> None:
    assert "Layer by layer" not in report_page(REPORT)
    found = words(report_page(REPORTS["full"]))
    assert "blocks.0 4,700 of 18,496" in found  # in the picture
    assert "stem.0 - - 640 float 640 100.00% 0.5" in found
    assert "blocks.0 32 16 18,496 int8 4,700 25.41% 0.002" in found
    costs = found.index("the most sensitive first")
    assert found.index("stem.0 0.5", costs) < found.index("blocks.0 0.002", costs) < found.index("head -1e-06", costs)
    many = words(report_page(REPORTS["many layers and classes"]))
    assert "150 more layers are in report.json" in many
    assert "the 24 largest of 300 layers" in many
    assert "layers.299.conv 19,136 of 76,544" in many


def test_samples_that_changed_their_class_are_told() -> None:
    assert "changed their class" not in report_page(REPORT)
    found = words(report_page(REPORTS["full"]))
    assert "tflite int8 360 9 2.50% 5 3" in found
    assert "tflite fp32 360 0 0.00% 0 0" in found
    assert "Right by class, of labels" in found
    assert "1 one 36 83.33% 86.11% +1" in found
    assert "3 three 5 6" in found
    assert "Samples by their number in the split, from 0: 12 (3 three to 5), 40 (0 zero to 1 one), and 7 more." in found
    assert "3 three taken for 9: 1,234 of 13,579" in found  # what a cell says when it is pointed at
    assert found.count("12k") == 10
    unlabelled = replace(INT8, classes=ClassChanges(360, 1, ((3, 5, 1),), ((12, 3, 5),)))
    plain = words(report_page(replace(REPORT, rows=(TORCH, FLOAT, unlabelled))))
    assert "Became right" not in plain
    assert "3 to 5 1 sample" in plain
    many = words(report_page(REPORTS["many layers and classes"]))
    assert "Right by class, of labels: the 16 of 100 classes that moved most" in many
    same = replace(INT8, classes=ClassChanges(360, 0))
    assert "every one of 360 samples the class" in words(report_page(replace(REPORT, rows=(TORCH, same))))


def test_distribution_of_latency_and_where_a_file_begins_to_differ_are_told() -> None:
    found = words(report_page(REPORTS["full"]))
    assert "half of the calls (box), median (mark)" in found
    assert "tflite int8 0.150 0.200 0.400 0.900 0.250" in found
    assert "differs tflite int8: off by 4 steps. The first layer that differs is 'blocks.0'" in found
    assert "p50 (mark), p95 and p99 (bars)" in words(report_page(REPORT))


def test_a_reference_interpreter_is_not_timed() -> None:
    found = words(report_page(REPORTS["reference"]))
    assert "run by a reference interpreter" in found
    assert "Median latency" not in found


def test_a_verdict_is_a_word_a_color_and_a_shape() -> None:
    shapes = set()
    for word in ("exact", "close", "differs", "broken"):
        row = replace(INT8, verdict=word, verdict_reason="since it is so")
        page = report_page(replace(REPORT, rows=(TORCH, FLOAT, row)))
        assert "since it is so" in words(page)
        (cell,) = set(
            re.findall(rf'<span class="state (\w+)"[^>]*>(<svg(?:(?!</svg>).)*</svg>)<span>{word}</span>', page)
        )
        shapes.add(cell)
    assert len({color for color, _ in shapes}) == 3
    assert len({shape for _, shape in shapes}) == 4
    assert choose_file(replace(REPORT, rows=(TORCH, row))) is None  # broken


def test_the_smallest_of_the_good_ones_is_chosen() -> None:
    worse = replace(INT8, target="onnx", size_bytes=8_000, metrics={"val_acc": 0.5})
    slower = replace(INT8, target="coreml", size_bytes=15_000, p50_ms=0.9)
    chosen = choose_file(replace(REPORT, rows=(*REPORT.rows, worse, slower)))
    assert chosen is not None
    assert chosen.row is INT8  # nearly as small as the smallest, and faster
    assert chosen.baseline is FLOAT
    assert "of those whose val_acc lies within 0.5% of the best; of sizes within 10%, the fastest" in chosen.why
    smaller = replace(slower, size_bytes=12_000)
    chosen = choose_file(replace(REPORT, rows=(*REPORT.rows, worse, smaller)))
    assert chosen is not None
    assert chosen.row is smaller
    assert chosen.baseline is TORCH
    only = choose_file(replace(REPORT, rows=(TORCH, FLOAT)))
    assert only is not None
    assert only.row is FLOAT


def test_a_loss_is_better_when_it_is_less() -> None:
    lossy = replace(INT8, target="onnx", size_bytes=8_000, metrics={"val_loss": 0.5})
    report = replace(REPORT, monitor="val_loss", rows=(TORCH, FLOAT, INT8, lossy))
    chosen = choose_file(report)
    assert chosen is not None
    assert chosen.row is INT8
    assert "val_loss 0.06 better" in words(report_page(report))


def test_side_by_side_tells_differences_and_what_makes_them_unfair() -> None:
    after = replace(
        REPORT,
        seed=1,
        versions={**REPORT.versions, "cpus": "8"},
        rows=(TORCH, FLOAT, replace(INT8, size_bytes=12_000, metrics={"val_acc": 0.97}), FAILED_LATER),
    )
    found = words(comparison_page({"before": REPORT, "after": after}))
    assert "before , after . Differences are against before." in found
    assert "12,000 -25.0%" in found
    assert "-0.01" in found
    assert "Latencies are not comparable: cpus of the machines differ." in found
    assert "after: onnx int8 (quantized in training) failed: too new" in found
    assert "cpus (version) 2 8" in found
    assert "seed 0 1" in found
    assert "torch (version)" not in found


FAILED_LATER = Row("onnx", "int8", "trained", error="too new")


def test_side_by_side_of_any_reports_is_a_whole_page() -> None:
    names = list(REPORTS)
    for start in range(len(names)):
        chosen = [names[start], *[name for name in (*names, *names)[start + 1 : start + 6] if name != names[start]]]
        read(comparison_page({name: REPORTS[name] for name in chosen}))
    hostile = comparison_page({HOSTILE: REPORT, LONG: REPORTS["hostile"], LONG + "2": REPORT})
    read(hostile)
    assert "<script" not in hostile


@pytest.mark.parametrize("count", [0, 1, 7])
def test_side_by_side_takes_two_to_six(count: int) -> None:
    with pytest.raises(ValueError, match=f"{count} reports cannot be put side by side; give 2 to 6"):
        comparison_page({f"{number}": REPORT for number in range(count)})


def test_sweep_shows_the_front_the_failures_and_the_way_to_each_trial() -> None:
    page = sweep_page(
        front(
            trial(0, url="https://example.org/run/0"),
            trial(1, feasible=False),
            trial(3),
            trial(4, spread={"val_acc": 0.002}),
            trial(5, status="failed", values={}, front=False, reason="out of <memory>"),
            trial(6, status="running", values={}, front=False, seconds=None),
        )
    )
    found, links = words(page), read(page).links
    assert "6 trials: 2 on the front, 1 failed, 1 still running." in found
    assert "trial 5: out of <memory>" in found
    assert "0.904 ± 0.002" in found
    assert "Settings in full: width is model.init_args.width, lr is optimizer.lr" in found
    assert "Constraints: tflite.size_bytes within 50,000. Made from recipe:quickstart." in found
    assert links == [
        *(
            "./trial-0004/seed-0/artifacts/report.html",
            "./trial-0000/artifacts/report.html",
            "https://example.org/run/0",
        ),
        *("./trial-0003/artifacts/report.html", "./trial-0001/artifacts/report.html"),
    ]
    assert page.count('class="way') == 1
    assert len(re.findall(r'class="mark c\d hollow', page)) == 1


def test_sweep_line_joins_what_none_beats_in_two_of_three_objectives() -> None:
    values = ((0.9, 10.0, 3.0), (0.8, 20.0, 1.0), (0.95, 30.0, 2.0))
    trials = [
        trial(number, front=True, values={"acc": acc, "bytes": size, "ms": ms})
        for number, (acc, size, ms) in enumerate(values)
    ]
    page = sweep_page(front(*trials, objectives={"acc": "max", "bytes": "min", "ms": "min"}))
    ways = [way.split() for way in re.findall(r'<polyline points="([^"]*)" class="way', page)]
    assert [len(way) for way in ways] == [2, 2]
    for way in ways:
        (left, low), (right, high) = (map(float, place.split(",")) for place in way)
        assert left < right
        assert low > high  # y grows downwards
    assert words(page).count("acc over") == 2


def test_sweep_takes_every_way_of_better() -> None:
    for up in ("max", "min"):
        for across in ("max", "min"):
            objectives = {"val_acc": up, "tflite.size_bytes": across}
            read(sweep_page(front(*map(trial, range(6)), objectives=objectives)))


def test_sweep_of_thousands_of_trials_stays_small() -> None:
    trials = [
        trial(number, front=number < 30, status="failed" if number % 7 == 6 else "complete", reason="x" * 3000)
        for number in range(4000)
    ]
    page = sweep_page(front(*trials))
    found = words(page)
    assert "3,750 more trials are in front.json" in found
    assert "and 531 more" in found
    assert all(f"./trial-{number:04d}/artifacts/report.html" in page for number in range(30) if number % 7 != 6)
    read(sweep_page(front(*(trial(number, front=True) for number in range(4000)))))


@pytest.mark.parametrize(
    "given",
    [
        front(),
        front(trial(0)),
        front(trial(0, status="failed", values={}, front=False)),
        front(trial(0, values={"val_acc": None, "tflite.size_bytes": 5})),
        front(trial(0), objectives={"val_acc": "max"}),
        front(trial(0, values={"val_acc": -0.5, "tflite.size_bytes": -5.0}), trial(2)),
        front(trial(0, settings={"a": [1, {"b": None}], "b": True, "c": HOSTILE})),
        front(trial(0, settings={"a.x": 1, "b.x": 2})),
    ],
)
def test_sweep_of_any_kind_is_a_whole_page(given: dict[str, object]) -> None:
    read(sweep_page(given))


def test_sweep_takes_no_markup_and_no_link_that_is_none() -> None:
    page = sweep_page(
        front(
            trial(0, url="javascript:alert(1)", folder="../../etc", settings={HOSTILE: HOSTILE}),
            trial(2, url=f"https://example.org/{HOSTILE}", folder="a b%/c"),
            trial(3, status="failed", reason=HOSTILE, front=False, values={}),
            study=HOSTILE,
            base=HOSTILE,
            objectives={"val_acc": "max", "tflite.size_bytes": "min"},
            constraints={HOSTILE: 1},
        )
    )
    links = read(page).links
    assert [address.split("/")[0] for address in links] == [".", "https:"]
    assert links[0] == "./a%20b%25/c/artifacts/report.html"
    assert "<script" not in page


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({}, "it lacks 'study', 'objectives', 'trials'"),
        (front(objectives={}), "its objectives are empty"),
        (front(objectives={"val_acc": "up"}), "objectives.val_acc is 'up' and not one of 'max', 'min'"),
        (front(trial(0, number="1")), r"trials\[0\].number is '1' and not a whole number"),
        (front(trial(0, status="done")), r"trials\[0\].status is 'done' and not one of"),
        (front(trial(0, values={"val_acc": "high"})), r"trials\[0\].values.val_acc is 'high' and not a finite number"),
    ],
)
def test_sweep_that_is_none_is_refused(given: dict[str, object], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        sweep_page(given)


def test_picture_of_a_sweep_alone_is_a_whole_file() -> None:
    import xml.etree.ElementTree as ElementTree

    root = ElementTree.fromstring(sweep_svg(front(*map(trial, range(6)))))
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert "prefers-color-scheme" in (root.findtext("{http://www.w3.org/2000/svg}style") or "")
    with pytest.raises(ValueError, match="a picture needs two objectives"):
        sweep_svg(front(trial(0), objectives={"val_acc": "max"}))
    with pytest.raises(ValueError, match="there is nothing to draw"):
        sweep_svg(front())


def test_every_mark_says_what_it_is() -> None:
    for page in (
        report_page(REPORT),
        sweep_page(front(*map(trial, range(6)))),
        comparison_page({"a": REPORT, "b": REPORT}),
    ):
        marks = re.findall(r'<(circle|polygon|rect)([^>]*class="(?:mark|bar)[^>]*)>(<title>[^<]+</title>)?', page)
        assert len(marks) > 3
        assert all(title for _, _, title in marks)


def test_markup_escapes_all_but_markup() -> None:
    assert tag("p", "<b>", Markup("<b></b>"), None, title='"') == '<p title="&quot;">&lt;b&gt;<b></b></p>'
    assert join("a", 1, tag("br")) == "a1<br>"
    assert text("x" * 30, 10) == "xxxxxxxxxx ... (20 characters more)"
    assert tag("circle", cx=1.0, cy=2.345) == '<circle cx="1" cy="2.35"></circle>'
    for value in (math.nan, math.inf):
        with pytest.raises(ValueError, match="give finite numbers"):
            tag("circle", cx=value)


@pytest.mark.parametrize(
    "address", ["javascript:alert(1)", "data:text/html,x", "//example.org", "https:", "http://[", ""]
)
def test_link_is_one_of_the_web_or_none(address: str) -> None:
    assert link(address, "run") == "run"


@pytest.mark.parametrize("path", ["/etc/x", "../x", "a/../x", "a\\b", "a//b", "a\nb\x00"])
def test_file_link_stays_in_its_folder(path: str) -> None:
    assert file_link(path, "file") == "file"


def test_colon_in_a_folder_is_no_scheme() -> None:
    assert 'href="./javascript%3Aalert/report.html"' in file_link("javascript:alert/report.html", "report")


def test_state_needs_a_known_kind() -> None:
    with pytest.raises(KeyError):
        state("great", "word")


def test_pages_need_no_torch_and_no_library() -> None:
    code = (
        "import sys; import lightning_edge.reporting.read; from lightning_edge.reporting.html import report_page;"
        "print([name for name in ('torch', 'numpy', 'rich', 'lightning') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_pruned_file_is_compared_with_the_network_before_it_was_cut() -> None:
    before = NetworkSize(24_000, 96_000, 5_000_000)
    cut = replace(REPORT, original=before, macs=2_000_000, phases={"prune": {"macs": 0.4, "end": None}})
    found = words(report_page(cut))
    for told in (
        "a network of 24,000 parameters, cut to 12,058. To ship: tflite int8",
        "6.0 times smaller than its float weights before compression. Against tflite fp32, after pruning: 3.1 times",
        "float weights before compression: 96,000; tflite fp32: 50,000, 3.1 times smaller",
        "What its metrics were is not known here.",
        "prune: macs=0.4",
    ):
        assert told in found, told
    assert "Before compression: 24,000 parameters, 5,000,000 multiply-accumulates a sample" in cut.to_markdown()
    assert "- prune: macs=0.4\n" in cut.to_markdown()
    assert "before compression" not in words(report_page(REPORT)).lower()
