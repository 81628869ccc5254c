"""The wheel, installed somewhere else, holds everything and finds it there."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pip(*arguments: str | Path) -> None:
    command = [sys.executable, "-m", "pip", "--quiet", "--no-input", *map(str, arguments)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with nothing but our installed wheel."""
    folder = tmp_path_factory.mktemp("wheel")
    # A copy, because building in the checkout picks up what an earlier build left there.
    source = folder / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "build", "site", "*.egg-info", "data", "artifacts")
    )
    pip("wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    (wheel,) = folder.glob("*.whl")
    pip("install", "--no-deps", "--no-index", "--target", folder / "site", wheel)
    return folder / "site"


def run(code: str, site: Path, cwd: Path) -> str:
    """Run code that sees our package only where the wheel put it."""
    # -S leaves out site-packages' .pth files, and with them an editable install of the checkout.
    paths = [str(site), *(path for path in sys.path if path.endswith("site-packages"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-S", "-c", code]
    result = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_wheel_holds_the_exporters(installed: Path, tmp_path: Path) -> None:
    code = (
        "import inspect; from lightning_edge.exporters import TARGETS, target; "
        "print(*[inspect.getfile(type(target(name))) for name in TARGETS])"
    )
    files = run(code, installed, tmp_path).split()
    assert len(files) == 4
    assert all(Path(file).is_relative_to(installed) for file in files)


@pytest.mark.slow
def test_wheel_fits_by_its_recipes(installed: Path, tmp_path: Path) -> None:
    code = "from lightning_edge.cli.main import main; main(['fit', '--config', 'recipe:quickstart', '--print_config'])"
    assert "lightning_edge.zoo.digits.DigitsDataModule" in run(code, installed, tmp_path)


def test_wheel_finds_and_prints_its_recipes(installed: Path, tmp_path: Path) -> None:
    code = (
        "from lightning_edge.cli.recipe_files import recipe_names, recipe_path\n"
        "from lightning_edge.cli.recipes import main\n"
        "print(*[recipe_path(name) for name in recipe_names()])\n"
        "main(['show', 'quickstart'])"
    )
    paths, _, configuration = run(code, installed, tmp_path).partition("\n")
    assert "lightning_edge.zoo.digits.DigitsDataModule" in configuration
    shipped = [Path(path) for path in paths.split()]
    folder = installed / "lightning_edge" / "recipes"
    names = {path.relative_to(folder) for path in shipped}
    assert names == {path.relative_to(ROOT / "recipes") for path in (ROOT / "recipes").rglob("*.yaml")}
    assert Path("compression/int8.yaml") in names
    assert all((folder / name).read_bytes() == (ROOT / "recipes" / name).read_bytes() for name in names)


def test_wheel_carries_types_license_and_command(installed: Path) -> None:
    assert (installed / "lightning_edge" / "py.typed").is_file()
    (metadata,) = installed.glob("lightning_edge-*.dist-info")
    assert "Apache License" in (metadata / "licenses" / "LICENSE").read_text()
    assert "lightning-edge = lightning_edge.cli.entry:main" in (metadata / "entry_points.txt").read_text()


def test_wheel_holds_every_package(installed: Path) -> None:
    for folder, name in (("lightning_edge", "lightning_edge"), ("exporters", "lightning_edge/exporters")):
        for path in (ROOT / folder).rglob("*.py"):
            assert (installed / name / path.relative_to(ROOT / folder)).is_file(), path


def test_extras_are_those_promised() -> None:
    extras = PROJECT["optional-dependencies"]
    assert {
        "executorch",
        "coreml",
        "tflite",
        "onnx",
        "openvino",
        "ethosu",
        "wandb",
        "ssh",
        "all",
        "dev",
        "docs",
    } <= set(extras)
    (everything,) = extras["all"]
    assert Requirement(everything).extras == {
        *("executorch", "coreml", "tflite", "onnx", "ethosu", "wandb", "ssh", "recipes", "sweep")
    }


def test_constraints_satisfy_every_requirement() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = {Requirement(line).name.lower(): next(iter(Requirement(line).specifier)).version for line in lines}
    wanted = [
        *PROJECT["dependencies"],
        *(line for extra in PROJECT["optional-dependencies"].values() for line in extra),
    ]
    for requirement in map(Requirement, wanted):
        if requirement.name != "lightning-edge":
            assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


def test_version_is_that_of_the_project() -> None:
    import lightning_edge

    assert lightning_edge.__version__ == version("lightning-edge") == PROJECT["version"]
