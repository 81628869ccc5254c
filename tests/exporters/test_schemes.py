"""Schemes for float networks: what is in the file, how near it is, and what is refused."""

from __future__ import annotations

import copy
import warnings
from functools import cache
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn

from lightning_edge.contents import Contents
from lightning_edge.errors import AgreementError, ExportError, RunnerError
from lightning_edge.exporters import ExportWarning, contents_of, export, options_of, target
from lightning_edge.exporters.verify import schemes
from lightning_edge.measure import Tolerance
from lightning_edge.quantization import quantize
from lightning_edge.zoo.digits import DigitsDataModule

SUFFIXES = {"executorch": ".pte", "coreml": ".mlpackage", "tflite": ".tflite", "onnx": ".onnx"}
TAKEN = {
    "executorch": ("fp16", "int8_dynamic", "int4_dynamic"),
    "coreml": ("fp16", "int8_weight_only", "int4_weight_only", "palette8", "palette6", "palette4", "sparse"),
    "tflite": ("fp16", "int8_weight_only", "int4_weight_only", "int8_dynamic", "int4_dynamic"),
    "onnx": ("fp16", "int8_weight_only", "int8_dynamic"),
}
REFUSED = [
    (name, scheme) for name, taken in TAKEN.items() for scheme in get_args(schemes.Scheme) if scheme not in taken
]
WEIGHTS = 64 * 32 + 32 * 8


@cache
def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 8)).eval()


@cache
def samples() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(8, 64)


def options(name: str, scheme: str) -> dict[str, Any]:
    return (
        {"scheme": scheme, "minimum_ios": 18}
        if (name, scheme) == ("coreml", "int4_weight_only")
        else {"scheme": scheme}
    )


# Stored as others are that are quick.
SLOW = {
    ("executorch", "int8_dynamic"),
    ("coreml", "palette8"),
    ("coreml", "palette6"),
    ("tflite", "int4_weight_only"),
    ("tflite", "int8_dynamic"),
}
DENSE = [
    pytest.param(name, scheme, marks=[pytest.mark.slow] * ((name, scheme) in SLOW))
    for name, taken in TAKEN.items()
    for scheme in taken
    if scheme != "sparse"
]
# Bytes of the weights by where `Contents` counts them, and the largest difference over the largest output.
EXPECTED = {
    "fp16": ("half_weight_bytes", 2 * WEIGHTS, 0.002),
    "int8_weight_only": ("int8_weight_bytes", WEIGHTS, 0.03),
    "int8_dynamic": ("int8_weight_bytes", WEIGHTS, 0.03),
    "int4_weight_only": ("int4_weight_bytes", WEIGHTS // 2, 0.4),
    "int4_dynamic": ("int4_weight_bytes", WEIGHTS // 2, 0.4),
    "palette8": ("palette_weight_bytes", WEIGHTS, 0.03),
    "palette6": ("palette_weight_bytes", WEIGHTS * 6 // 8, 0.06),
    "palette4": ("palette_weight_bytes", WEIGHTS // 2, 0.3),
}
COUNTED = ("half_weight_bytes", "int8_weight_bytes", "int4_weight_bytes", "palette_weight_bytes", "sparse_weight_bytes")


@pytest.mark.parametrize(("name", "scheme"), DENSE)
def test_the_file_holds_the_scheme_and_computes_the_network(name: str, scheme: str, tmp_path: Path) -> None:
    network, x = mlp(), samples()
    with warnings.catch_warnings():
        warnings.simplefilter("error", ExportWarning)
        if (name, scheme) == ("tflite", "int4_weight_only"):  # its delegate takes no 4-bit weights with float inputs
            warnings.filterwarnings("ignore", "tflite: 100.0% of the multiply-accumulates run outside", ExportWarning)
        artifact = export(
            network, name, tmp_path / f"net{SUFFIXES[name]}", inputs=x, batches=[x], **options(name, scheme)
        )
    contents = artifact.contents
    where, stored_bytes, largest = EXPECTED[scheme]
    assert {key: getattr(contents, key) for key in COUNTED} == {**dict.fromkeys(COUNTED, 0), where: stored_bytes}
    assert contents.float_weight_bytes == contents.half_weight_bytes
    assert contents.precision == ("int8" if scheme.startswith("int") else "fp32")
    assert stored_bytes < artifact.size_bytes
    reference = network(x)
    difference = (artifact(x)[0].float() - reference).abs().max() / reference.abs().max()
    assert 0 < difference < largest


# All are read in the same way.
@pytest.mark.parametrize(
    "scheme",
    [pytest.param(scheme, marks=[pytest.mark.slow] * (scheme != "int8_weight_only")) for scheme in TAKEN["tflite"]],
)
def test_weights_behind_the_flatbuffer_are_read(scheme: str, tmp_path: Path) -> None:
    """ai-edge-quantizer puts them there from 256 KiB on."""
    pytest.importorskip("ai_edge_quantizer")
    torch.manual_seed(0)
    network, x = nn.Sequential(nn.Linear(64, 9_000), nn.Hardtanh(), nn.Linear(9_000, 8)).eval(), samples()
    path = tmp_path / "net.tflite"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExportWarning)
        artifact = export(network, "tflite", path, inputs=x, batches=[x], scheme=scheme)
    bits = {"fp16": 16, "int4": 4}.get(scheme.split("_")[0], 8)
    stored = 9_000 * (64 + 8) * bits // 8
    assert stored >= 256 * 1024
    assert sum(getattr(artifact.contents, key) for key in COUNTED) == stored
    assert stored < artifact.size_bytes < stored + 20 * 9_008  # scales, zero points and biases of channels


def test_constants_behind_the_flatbuffer_that_are_cut_are_an_error(tmp_path: Path) -> None:
    quantizer = pytest.importorskip("ai_edge_quantizer.quantizer")
    whole, cut = tmp_path / "whole.tflite", tmp_path / "cut.tflite"
    export(nn.Linear(64, 9_000), "tflite", whole, inputs=samples())
    work = quantizer.Quantizer(str(whole))
    work.add_weight_only_config(regex=".*", operation_name="*", num_bits=8)
    data = bytes(work.quantize().quantized_model)
    whole.write_bytes(data)
    assert contents_of(whole).int8_weight_bytes == 9_000 * 64
    cut.write_bytes(data[:-100])
    with pytest.raises(RunnerError, match="a constant ends at byte"):
        contents_of(cut)


def test_palettes_are_counted_as_they_are_packed(tmp_path: Path) -> None:
    """From iOS 18 on they are another operation than before, which the forms of all schemes show."""
    path = tmp_path / "net.mlpackage"
    artifact = export(mlp(), "coreml", path, inputs=samples(), scheme="palette6", minimum_ios=18)
    assert artifact.contents.palette_weight_bytes == WEIGHTS * 6 // 8


@pytest.mark.parametrize("minimum_ios", [pytest.param(17, marks=pytest.mark.slow), 18])
def test_zeros_are_left_out_of_a_core_ml_package_and_change_nothing(minimum_ios: int, tmp_path: Path) -> None:
    network = copy.deepcopy(mlp())
    with torch.no_grad():
        network[0].weight.view(-1)[: 32 * 48] = 0.0  # three quarters of the first layer
    path = tmp_path / "net.mlpackage"
    with pytest.warns(ExportWarning, match=f"scheme sparse: {4 * 256} bytes of the weights stay float"):
        artifact = export(network, "coreml", path, inputs=samples(), scheme="sparse", minimum_ios=minimum_ios)
    assert artifact.contents.sparse_weight_bytes == 4 * 32 * 16 + 32 * 64 // 8
    torch.testing.assert_close(artifact(samples())[0], network(samples()), rtol=0, atol=1e-6)


def test_weights_without_zeros_are_not_stored_sparse(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"found no weight with zeros enough .* Train with Sparsify first"):
        export(mlp(), "coreml", tmp_path / "net.mlpackage", inputs=samples(), scheme="sparse")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("name", "scheme"), REFUSED)
def test_what_a_target_does_not_take_is_refused_with_what_it_takes(name: str, scheme: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{name}: scheme='{scheme}' is not one of .*{TAKEN[name][0]}"):
        export(mlp(), name, tmp_path / f"net{SUFFIXES[name]}", inputs=samples(), scheme=scheme)
    assert not list(tmp_path.iterdir())


def test_a_quantized_network_has_a_scheme_already(tmp_path: Path) -> None:
    quantized = quantize(mlp(), [samples()])
    with pytest.raises(ValueError, match="scheme='fp16' is for float networks"):
        export(quantized, "tflite", tmp_path / "net.tflite", scheme="fp16")
    assert options_of("tflite", "int8", {"tflite": {"scheme": "fp16", "io": "float"}}) == {"io": "float"}
    assert options_of("tflite", "fp32", {"tflite": {"scheme": "fp16", "io": "float"}}) == {"scheme": "fp16"}


def test_four_bits_on_an_old_system_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="minimum_ios=17: scheme='int4_weight_only' needs minimum_ios=18"):
        export(mlp(), "coreml", tmp_path / "net.mlpackage", inputs=samples(), scheme="int4_weight_only")
    assert not list(tmp_path.iterdir())


def test_a_network_without_a_layer_for_the_scheme_is_refused(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).eval()
    with pytest.raises(ExportError, match="scheme='int8_dynamic' left no weight in that form"):
        export(network, "executorch", tmp_path / "net.pte", inputs=torch.randn(1, 3, 8, 8), scheme="int8_dynamic")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_network_with_some_such_layers_is_told_of_the_others(tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 4)).eval()
    with pytest.warns(ExportWarning, match=f"scheme int8_dynamic: {4 * 216} bytes of the weights stay float"):
        export(network, "executorch", tmp_path / "net.pte", inputs=torch.randn(1, 3, 8, 8), scheme="int8_dynamic")


@pytest.mark.parametrize(
    "scheme",
    [
        *(pytest.param(scheme, marks=pytest.mark.slow) for scheme in ("int8_dynamic", "int4_weight_only")),
        "int4_dynamic",
    ],
)
def test_depthwise_layers_of_a_tflite_are_in_8_bits_and_in_its_delegate(scheme: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 16, 1), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16)).eval()
    x = torch.randn(2, 3, 8, 8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExportWarning)  # 4-bit convolutions run outside
        artifact = export(network, "tflite", tmp_path / "net.tflite", inputs=x[:1], batches=[x], scheme=scheme)
    contents = artifact.contents
    inside, depthwise = 3 * 16, 9 * 16
    if scheme == "int8_dynamic":
        assert (contents.int8_weight_bytes, contents.int4_weight_bytes) == (inside + depthwise, 0)
    else:
        assert (contents.int8_weight_bytes, contents.int4_weight_bytes) == (depthwise, inside // 2)
    assert contents.float_weight_bytes == 0
    assert contents.placements is not None
    assert "DEPTHWISE_CONV_2D" not in {entry.op for entry in contents.placements.fallback}


@pytest.mark.parametrize(
    "scheme",
    [
        pytest.param("fp16", marks=pytest.mark.slow),
        "int8_dynamic",
        pytest.param("int4_dynamic", marks=pytest.mark.slow),
    ],
)
def test_a_scheme_that_makes_next_to_nothing_smaller_is_refused(scheme: str, tmp_path: Path) -> None:
    network = nn.Sequential(nn.Conv2d(3, 64, 5), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 2))
    with pytest.raises(ExportError, match=rf"scheme='{scheme}' leaves {4 * 4800} bytes of the weights float beside"):
        export(network.eval(), "executorch", tmp_path / "net.pte", inputs=torch.randn(1, 3, 8, 8), scheme=scheme)
    assert not list(tmp_path.iterdir())


def test_a_tolerance_of_the_user_comes_first(tmp_path: Path) -> None:
    with pytest.raises(AgreementError, match="allowed 1e-06"):
        export(
            mlp(),
            "onnx",
            tmp_path / "net.onnx",
            inputs=samples(),
            scheme="int8_weight_only",
            tolerance=Tolerance(max_relative=1e-6, top1=None),
            strict="close",
        )


@pytest.mark.parametrize("name", SUFFIXES)
def test_every_scheme_of_a_target_has_a_tolerance(name: str) -> None:
    for scheme in target(name).schemes:
        assert schemes.tolerance(scheme).max_relative < 1


def test_a_file_that_is_float_after_all_is_caught() -> None:
    for scheme in get_args(schemes.Scheme):
        with pytest.raises(ExportError, match=r"no weight .*.100 bytes are float"):
            schemes.check_scheme(Contents(int8_weight_bytes=0, float_weight_bytes=100, ops={}), scheme, "tflite")


@cache
def trained() -> tuple[nn.Module, Tensor]:
    """A network of wide linear layers trained on handwritten digits, and those it was not trained on."""
    pytest.importorskip("sklearn")
    data = DigitsDataModule(batch_size=2000)
    data.setup("fit")
    images, labels = next(iter(data.train_dataloader()))
    others, _ = next(iter(data.val_dataloader()))
    # Rows of 576 weights: among 64 a scale of its own for each 32 is as often worse as better.
    images, others = (nn.functional.interpolate(part, scale_factor=3, mode="bilinear") for part in (images, others))
    torch.manual_seed(0)
    layers = [nn.Linear(576, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 10)]
    network = nn.Sequential(nn.Flatten(), *layers)
    optimizer = torch.optim.Adam(network.parameters(), 5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network.eval(), others


def error_of(group_size: int | None, folder: Path) -> tuple[float, Contents]:
    """Root mean square difference of a file's outputs over that of the outputs, and what the file holds."""
    network, x = trained()
    path = folder / f"{group_size}.pte"
    options: dict[str, Any] = {"scheme": "int4_dynamic", "group_size": group_size}
    artifact = export(network, "executorch", path, inputs=x, batches=[x[:8]], isolated=False, **options)
    with torch.no_grad():
        reference = network(x)
    return float((artifact(x)[0] - reference).norm() / reference.norm()), artifact.contents


@pytest.mark.slow
def test_groups_of_four_bit_weights_are_nearer_than_one_scale_a_channel(tmp_path: Path) -> None:
    by_channel, plain = error_of(None, tmp_path)
    in_groups, grouped = error_of(32, tmp_path)
    assert grouped.int4_weight_bytes == plain.int4_weight_bytes == (576 * 256 + 256 * 256 + 256 * 10) // 2
    assert grouped.float_weight_bytes == 0
    assert in_groups < 0.75 * by_channel


def test_layers_that_the_groups_do_not_divide_stay_float_and_are_named(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ExportWarning)
        artifact = export(
            mlp(), "executorch", tmp_path / "net.pte", inputs=samples(), scheme="int4_dynamic", group_size=64
        )
    told = [str(warning.message) for warning in caught if issubclass(warning.category, ExportWarning)]
    assert "executorch: the inputs of '2' (32 inputs) are no multiple of 64, and these layers stay float" in told
    assert artifact.contents.int4_weight_bytes == 64 * 32 // 2
    assert artifact.contents.float_weight_bytes == 4 * 32 * 8


@pytest.mark.parametrize("group_size", [0, 16, 48, -32, True, 32.0])
def test_groups_that_xnnpack_does_not_have_are_refused(group_size: Any, tmp_path: Path) -> None:
    options: dict[str, Any] = {"scheme": "int4_dynamic", "group_size": group_size}
    with pytest.raises(ValueError, match=r"group_size=.* is not allowed: .* multiple of 32 inputs.*or None"):
        export(mlp(), "executorch", tmp_path / "net.pte", inputs=samples(), **options)
    assert not list(tmp_path.iterdir())


def test_groups_are_of_four_bits_only(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"group_size=64 says something of scheme='int4_dynamic' only"):
        export(mlp(), "executorch", tmp_path / "net.pte", inputs=samples(), scheme="int8_dynamic", group_size=64)
    given = {"executorch": {"scheme": "int4_dynamic", "group_size": 64, "backend": "xnnpack"}}
    assert options_of("executorch", "int8", given) == {"backend": "xnnpack"}


def blocks_of(path: Path) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Shapes of the integers and the scales of each weight in a Core ML package."""
    from lightning_edge.exporters.coreml import package as mlpackage

    operations = mlpackage.read(path).operations
    kept = [operation.inputs for operation in operations if operation.kind == "constexpr_blockwise_shift_scale"]
    return [(inputs["data"].value.shape, inputs["scale"].value.shape) for inputs in kept]  # type: ignore[union-attr]


@pytest.mark.slow
def test_four_bits_in_blocks_are_read_back_and_nearer(tmp_path: Path) -> None:
    network, x = trained()
    errors = []
    for block_size in (None, 64):
        path = tmp_path / f"{block_size}.mlpackage"
        options: dict[str, Any] = {"scheme": "int4_weight_only", "minimum_ios": 18, "block_size": block_size}
        artifact = export(network, "coreml", path, inputs=x, batches=[x[:8]], **options)
        assert artifact.contents.int4_weight_bytes == (576 * 256 + 256 * 256 + 256 * 10) // 2
        assert artifact.contents.float_weight_bytes == 0
        with torch.no_grad():
            reference = network(x)
        errors.append(float((artifact(x)[0] - reference).norm() / reference.norm()))
    by_channel, in_blocks = errors
    assert in_blocks < 0.9 * by_channel  # 0.7 to 0.8: what is trained depends a little on the CPU
    assert blocks_of(path) == [((256, 576), (256, 9)), ((256, 256), (256, 4)), ((10, 256), (10, 4))]


def test_blocks_are_read_back_and_layers_that_they_do_not_divide_are_named(tmp_path: Path) -> None:
    torch.manual_seed(0)
    network, x, path = (
        nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 8)).eval(),
        samples(),
        tmp_path / "n.mlpackage",
    )
    # Blocks of very different sizes: with one scale for both the small one would be all zeros.
    network[0].weight.data[:, :32] *= 100
    x = torch.cat([x[:, :32] / 100, x[:, 32:]], 1)
    options: dict[str, Any] = {"scheme": "int4_weight_only", "minimum_ios": 18, "block_size": 32}
    with pytest.warns(ExportWarning, match=r"of '2' \(48 inputs\) are no multiple of 32, and have one scale a ch"):
        artifact = export(network, "coreml", path, inputs=x, **options)
    assert artifact.contents.int4_weight_bytes == (48 * 64 + 8 * 48) // 2
    assert artifact.contents.float_weight_bytes == 0
    assert blocks_of(path) == [((48, 64), (48, 2)), ((8, 48), (8, 1))]
    reference = network(x)
    assert float((artifact(x)[0] - reference).norm() / reference.norm()) < 0.2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scheme": "int4_weight_only", "block_size": 8}, r"block_size=8 is not allowed: give a whole number of 16"),
        ({"scheme": "int4_weight_only", "block_size": 32.0}, r"block_size=32\.0 is not allowed"),
        ({"scheme": "int8_weight_only", "block_size": 32}, r"says something of scheme='int4_weight_only' only"),
        ({"sparse_weights": True}, r"sparse_weights is for int8 networks; for a float one give scheme='sparse'"),
    ],
)
def test_ways_of_core_ml_to_store_weights_that_do_not_go_together(
    options: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        export(mlp(), "coreml", tmp_path / "net.mlpackage", inputs=samples(), minimum_ios=18, **options)
    assert not list(tmp_path.iterdir())


def thinned() -> nn.Module:
    """The network with seven of eight weights of its first layer zero, as `Sparsify` leaves them."""
    network = copy.deepcopy(mlp())
    with torch.no_grad():
        network[0].weight.view(-1, 8)[:, 1:] = 0.0
    return network


@pytest.mark.slow
def test_zeros_are_left_out_of_an_int8_core_ml_package_and_change_nothing(tmp_path: Path) -> None:
    quantized = quantize(thinned(), [samples()])
    made = {
        sparse: export(
            quantized,
            "coreml",
            tmp_path / f"{sparse}.mlpackage",
            batches=[samples()],
            minimum_ios=18,
            sparse_weights=sparse,
        )
        for sparse in (False, True)
    }
    assert torch.equal(made[True](samples())[0], made[False](samples())[0])
    contents = made[True].contents
    kept = contents.int8_weight_bytes - 8 * 32  # the second layer is whole
    assert 32 * 8 - 4 < kept <= 32 * 8  # of the first one in eight, but for what rounds to zero
    assert contents.sparse_weight_bytes == 32 * 64 // 8
    assert contents.float_weight_bytes == made[False].contents.sparse_weight_bytes == 0
    assert (contents.precision, contents.float_compute_ops) == ("int8", ())
    assert made[True].size_bytes < made[False].size_bytes


def test_an_int8_network_without_zeros_gets_no_smaller_and_is_refused(tmp_path: Path) -> None:
    quantized = quantize(mlp(), [samples()])
    with pytest.raises(ExportError, match=r"makes the package no smaller \(\d+ bytes against \d+\): .*Sparsify first"):
        export(quantized, "coreml", tmp_path / "net.mlpackage", minimum_ios=18, sparse_weights=True)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="minimum_ios=17: sparse_weights of int8 networks need minimum_ios=18"):
        export(quantized, "coreml", tmp_path / "net.mlpackage", sparse_weights=True)
    given = {"coreml": {"sparse_weights": True, "minimum_ios": 18}}
    assert options_of("coreml", "fp32", given) == {"minimum_ios": 18}
