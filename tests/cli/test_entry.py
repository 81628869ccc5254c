"""The first moments of the command: help without torch, modules of the current folder, checkpoints without callback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from torch import nn

from lightning_edge.cli import commands, entry, microcontroller
from lightning_edge.cli.main import EdgeCLI, main
from lightning_edge.exporters.micro import vela
from lightning_edge.record import KEY


@pytest.mark.parametrize(
    "arguments", [["--help"], [], *([name, "--help"] for name in sorted(commands.COMMANDS))], ids=str
)
def test_help_needs_no_torch(arguments: list[str]) -> None:
    code = (
        f"import sys\nsys.argv = ['lightning-edge', *{arguments!r}]\nfrom lightning_edge.cli.entry import main\n"
        "try:\n    main()\nexcept SystemExit as error:\n"
        "    print('status', error.code, [name for name in ('torch', 'lightning') if name in sys.modules])\n"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "usage: lightning-edge" in found.stdout
    assert f"status {0 if arguments else 2} []" in found.stdout


def test_help_names_everything_there_is(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-edge", "--help"])
    with pytest.raises(SystemExit):
        entry.main()
    out = capsys.readouterr().out
    assert {*entry.SUBCOMMANDS} == {*EdgeCLI.subcommands()}
    assert {*commands.COMMANDS} == {*commands._MODULES}
    assert all(name in out for name in (*entry.SUBCOMMANDS, *commands.COMMANDS))
    assert microcontroller._ETHOSU == vela.CONFIGURATIONS


def test_a_command_that_there_is_not(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["lightning-edge", "sweeep", "a.yaml"])
    with pytest.raises(SystemExit) as exit_info:
        entry.main()
    assert exit_info.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: there is no command 'sweeep'\n  did you mean: sweep\n  allowed: fit, ")
    assert all(name in error for name in (*entry.SUBCOMMANDS, *commands.COMMANDS))


def test_an_interrupted_command_is_one_line_and_status_130(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(args: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys, "argv", ["lightning-edge", "export"])
    monkeypatch.setattr(commands, "run", interrupted)
    with pytest.raises(SystemExit) as exit_info:
        entry.main()
    assert exit_info.value.code == 130
    assert capsys.readouterr().err == "interrupted; nothing half-written is left\n"


def test_modules_of_the_current_folder_are_found_behind_all_others(tmp_path: Path) -> None:
    """With a command line that stands for Lightning's; the slow test has a configuration that names the module."""
    (tmp_path / "my_network.py").write_text("NAME = 'mine'\n")
    (tmp_path / "yaml.py").write_text("raise SystemExit('not this one')\n")
    paths = [path for path in sys.path if path not in ("", str(tmp_path))]
    code = (
        f"import sys, types\nsys.path = {paths!r}\nsys.argv = ['lightning-edge', 'fit']\n"
        "def run():\n    import my_network, yaml\n    print(my_network.NAME, yaml.safe_load('[1]'))\n"
        "command_line = types.ModuleType('lightning_edge.cli.main')\ncommand_line.main = run\n"
        "sys.modules['lightning_edge.cli.main'] = command_line\n"
        "from lightning_edge.cli.entry import main\nmain()\n"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert found.stdout == "mine [1]\n", found.stderr


@pytest.mark.slow
def test_modules_of_the_current_folder_are_found_and_take_no_librarys_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "my_network.py").write_text(
        "from torch import nn\n\n\nclass Mine(nn.Sequential):\n    def __init__(self, width: int = 3) -> None:\n"
        "        super().__init__(nn.Linear(width, 2))\n"
    )
    (tmp_path / "yaml.py").write_text("raise SystemExit('not this one')\n")
    settings = {
        "model": {
            "class_path": "lightning_edge.zoo.task.Classifier",
            "init_args": {"network": {"class_path": "my_network.Mine", "init_args": {"width": 5}}},
        }
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings))
    monkeypatch.chdir(tmp_path)
    paths = [path for path in sys.path if path not in ("", str(tmp_path))]
    code = (
        f"import sys\nsys.path = {paths!r}\nsys.argv = ['lightning-edge', 'fit', '--config', 'config.yaml', "
        "'--print_config']\nfrom lightning_edge.cli.entry import main\nmain()\n"
    )
    command = [sys.executable, "-c", code]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert found.returncode == 0, found.stderr
    assert yaml.safe_load(found.stdout)["model"]["init_args"]["network"]["class_path"] == "my_network.Mine"


class Task(L.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Linear(2, 2)


def test_a_compressed_checkpoint_without_the_callback_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = L.Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    trainer.strategy.connect(Task())
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    state = torch.load(tmp_path / "plain.ckpt", weights_only=True)
    changes = [{"phase": "quantize", "kind": kind} for kind in ("fold_batch_norm", "freeze_observers")]
    torch.save({**state, KEY: {"changes": changes}}, tmp_path / "c.ckpt")
    (tmp_path / "config.yaml").write_text(
        yaml.safe_dump({"model": {"class_path": f"{__name__}.Task"}, "trainer": quiet})
    )
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit_info:
        main(["test", "--config", "config.yaml", "--ckpt_path", "c.ckpt"])
    assert exit_info.value.code == 2
    told = capsys.readouterr().err
    assert "error: ckpt_path: c.ckpt is of a compressed training (quantize)" in told
    assert "Give the configuration the EdgeCompressionCallback of that training" in told
