"""What coremltools writes otherwise, or not at all: the same values as torch's, also at large and small inputs."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_edge import export, load
from lightning_edge.exporters.coreml.decompositions import decompositions
from lightning_edge.measure import Tolerance

pytest.importorskip("coremltools")

OPERATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "log_softmax": lambda x: functional.log_softmax(x, -1),
    "logsigmoid": functional.logsigmoid,
    "logaddexp": lambda x: torch.logaddexp(x, x.flip(-1)),
    "gelu": functional.gelu,
    "gelu_tanh": lambda x: functional.gelu(x, approximate="tanh"),
    "celu": lambda x: functional.celu(x, 0.5),
    "hardshrink": functional.hardshrink,
    "addcmul": lambda x: torch.addcmul(x, x, x.tanh(), value=2),
    "addcdiv": lambda x: torch.addcdiv(x, x, x.abs() + 0.5, value=0.5),
    "reciprocal": lambda x: (x.abs() + 0.001).reciprocal(),
    "rms_norm": lambda x: functional.rms_norm(x, (8,), torch.linspace(0.5, 2.0, 8), eps=1e-5),
    "group_norm": lambda x: functional.group_norm(x, 2, torch.linspace(0.5, 2.0, 8), torch.linspace(-1, 1, 8)),
    "cosine_similarity": lambda x: functional.cosine_similarity(x, x.flip(-1), dim=-1)[:, None],
    "std_mean": lambda x: torch.cat(torch.std_mean(x / 256, -1, keepdim=True), -1),
    "cdist": lambda x: torch.cdist((x / 16).unflatten(1, (2, 4)), x.flip(1).unflatten(1, (2, 4)) / 16).flatten(1),
    "mean of a volume": lambda x: functional.adaptive_avg_pool3d((x / 16).unflatten(1, (1, 2, 2, 2)), 1),
    "pool of a volume": lambda x: functional.adaptive_avg_pool3d((x / 16).unflatten(1, (1, 2, 2, 2)), (1, 2, 1)),
    "nearest": lambda x: functional.interpolate(x.unflatten(1, (2, 2, 2)), scale_factor=2, mode="nearest-exact"),
    "rows": lambda x: functional.interpolate(x.unflatten(1, (2, 2, 2)), scale_factor=1.5, mode="nearest"),
    "booleans": lambda x: torch.where(((x > 0) & (x < 5)) | (x < -5) ^ (x < -50), x, 1.0),
}
# float16 ends at 65504.
SCALES = (0.0, 1e-3, 1.0, 10.0, 100.0, 1000.0, 10000.0)


class Every(nn.Module):
    """One output for each operation."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: function(x) for name, function in OPERATIONS.items()}


def given(scale: float) -> Tensor:
    # Values that float16 has, so that its rounding of the input is no difference.
    return (torch.randn(1, 8, generator=torch.manual_seed(0)) * scale).half().float()


@cache
def files(folder: Path, precision: str) -> Callable[[Tensor], list[Tensor]]:
    path = folder / f"{precision}.mlpackage"
    export(
        Every().eval(),
        "coreml",
        path,
        inputs=given(1.0),
        tolerance=Tolerance(max_relative=1e-2),
        compute_precision=precision,
    )
    return load(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("decompositions")


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize(("precision", "rtol", "atol"), [("float32", 1e-4, 1e-6), ("float16", 2e-2, 4e-3)])
def test_a_package_gives_what_torch_gives_at_every_size(
    precision: str, rtol: float, atol: float, scale: float, folder: Path
) -> None:
    x = given(scale)
    got = dict(zip(OPERATIONS, files(folder, precision)(x), strict=True))
    with torch.no_grad():
        expected = Every()(x)
    for name, values in expected.items():
        torch.testing.assert_close(got[name], values, rtol=rtol, atol=atol, msg=lambda told, of=name: f"{of}: {told}")


@cache
def written_out() -> torch.export.ExportedProgram:
    program = torch.export.export(Every(), (given(1.0),))
    return program.run_decompositions(decompositions(program.graph))


@pytest.mark.parametrize("scale", SCALES)
def test_what_is_written_out_computes_the_same(scale: float) -> None:
    written = written_out()
    names = {str(node.target) for node in written.graph.nodes}
    assert not names & {"aten.log_softmax.int", "aten.rms_norm.default", "aten.reciprocal.default", "aten.celu.default"}
    assert "aten.gelu.default" in names  # the exact form stays
    for name, values in written.module()(given(scale)).items():
        torch.testing.assert_close(values, OPERATIONS[name](given(scale)), rtol=1e-4, atol=1e-6)


def test_recurrent_layers_are_written_out_only_where_there_are_some() -> None:
    recurrent = torch.export.export(nn.GRU(4, 4), (torch.randn(3, 1, 4),)).graph
    assert set(decompositions(recurrent)) - set(decompositions(torch.fx.Graph())) == {torch.ops.aten.gru.input}
