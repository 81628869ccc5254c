"""Reference networks, data modules and the task."""

from __future__ import annotations

import hashlib
import io
import tarfile
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn

from lightning_edge.zoo import cifar10
from lightning_edge.zoo.augmentation import mirror_and_shift
from lightning_edge.zoo.cifar10 import CIFAR10DataModule, fetch
from lightning_edge.zoo.digits import DigitsDataModule
from lightning_edge.zoo.download import download
from lightning_edge.zoo.image_files import read_images
from lightning_edge.zoo.networks import (
    DSCNN,
    Autoencoder,
    DigitsCNN,
    MobileNetV1,
    MobileNetV2,
    MobileNetV3Small,
    ResNet8,
    ResNet56,
    load_reference_weights,
)
from lightning_edge.zoo.task import Classifier

# Keras counts running statistics as parameters of BatchNorm; these are its published totals.
KERAS_TOTALS = [
    (ResNet8, (3, 32, 32), 10, 78_666),
    (lambda: ResNet8(width=40), (3, 32, 32), 10, 482_730),
    (DSCNN, (1, 49, 10), 12, 24_908),
    (MobileNetV1, (3, 96, 96), 2, 221_794),
    (Autoencoder, (640,), 640, 269_992),
]


@pytest.mark.parametrize(("build", "shape", "outputs", "total"), KERAS_TOTALS)
def test_reference_network_is_the_published_one(build, shape, outputs, total) -> None:
    network = build().eval()
    assert network(torch.zeros(2, *shape)).shape == (2, outputs)
    state = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    assert sum(value.numel() for value in state.values()) == total
    assert all(layer.eps == 1e-3 for layer in network.modules() if isinstance(layer, nn.modules.batchnorm._BatchNorm))


def test_resnet56_has_56_layers() -> None:
    """Of the main path: He et al. count 0.85 million parameters; here shortcuts, biases and BatchNorm's come to it."""
    network = ResNet56().eval()
    assert network(torch.zeros(1, 3, 32, 32)).shape == (1, 10)
    layers = [module for module in network.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    assert sum(layer.weight.shape[-2:] == (3, 3) or isinstance(layer, nn.Linear) for layer in layers) == 56
    assert 850_000 < sum(parameter.numel() for parameter in network.parameters()) < 862_000


def test_stride_pads_behind_as_tensorflow_does() -> None:
    # TensorFlow's SAME at stride 2 on 32 pixels: output 0 sees inputs 0, 1, 2, so input 0 meets the first tap.
    convolution = next(stage for stage in ResNet8().stages if stage.first[0].__class__ is nn.ZeroPad2d).first
    pad, layer = convolution[0], convolution[1]
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        layer.weight[0, 0, 0, 0] = 1.0
        image = torch.arange(32 * 32, dtype=torch.float32).reshape(1, 1, 32, 32).expand(1, 16, 32, 32)
        output = layer(pad(image))
    assert output.shape == (1, 32, 16, 16)
    assert torch.equal(output[0, 0], image[0, 0, ::2, ::2])


@pytest.mark.parametrize("build", [lambda: MobileNetV2(width=0.1), lambda: MobileNetV3Small(width=0.1)])
def test_mobile_network_runs(build) -> None:
    assert build().eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 10)


def _weights(network: nn.Module) -> dict[str, np.ndarray]:
    """What a reference file holds: layers numbered in Keras' order."""
    layers = [layer for layer in network.modules() if isinstance(layer, nn.Conv2d | nn.Linear | nn.BatchNorm2d)]
    stored = {}
    for number, layer in enumerate(layers):
        for name, value in layer.state_dict().items():
            if name != "num_batches_tracked":
                stored[f"{number:02}.layer.{name}"] = np.random.default_rng(number).random(value.shape, np.float32)
    return stored


def test_reference_weights_go_into_their_layers(tmp_path: Path) -> None:
    stored = _weights(ResNet8())
    np.savez(tmp_path / "weights.npz", **stored)
    network = ResNet8()
    load_reference_weights(network, tmp_path / "weights.npz")
    assert np.array_equal(network.stem[0].weight.detach().numpy(), stored["00.layer.weight"])
    assert np.array_equal(network.stages[1].shortcut.weight.detach().numpy(), stored["09.layer.weight"])
    assert np.array_equal(network.stages[1].norm.running_var.numpy(), stored["10.layer.running_var"])
    assert np.array_equal(network.head[2].bias.detach().numpy(), stored["16.layer.bias"])


def test_reference_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "weights.npz", **_weights(ResNet8()))
    with pytest.raises(ValueError, match=r"holds 17 layers, DSCNN has"):
        load_reference_weights(DSCNN(), tmp_path / "weights.npz")


def test_digits_are_split_without_overlap() -> None:
    data = DigitsDataModule()
    data.setup("fit")
    parts = [loader.dataset for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]
    assert [len(part) for part in parts] == [1077, 360, 360]
    images, labels = next(iter(data.val_dataloader()))
    assert images.shape == (64, 1, 8, 8)
    assert images.max() == 1.0
    assert labels.dtype == torch.int64
    again = DigitsDataModule()
    again.setup("fit")
    assert torch.equal(parts[0].images, again.train_dataloader().dataset.images)
    other = DigitsDataModule(seed=1)
    other.setup("fit")
    assert not torch.equal(parts[0].images, other.train_dataloader().dataset.images)


def _images(count: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    return random.integers(0, 256, (count, 32, 32, 3), np.uint8), random.integers(0, 10, count).astype(np.uint8)


def _write(folder: Path, form: str) -> tuple[np.ndarray, np.ndarray]:
    """Write 20 training images and 5 test images in one of the formats; return the training images, NHWC."""
    folder.mkdir(exist_ok=True)
    images, labels = _images(20)
    tests, test_labels = _images(5, seed=1)
    if form == "nhwc":
        np.savez(folder / "train.npz", images=images, labels=labels)
        np.savez(folder / "test.npz", images=tests, labels=test_labels)
    elif form == "nchw":
        np.savez(folder / "train_0.npz", x=images[:9].transpose(0, 3, 1, 2), y=labels[:9].astype(np.int64))
        np.savez(folder / "train_1.npz", x=images[9:].transpose(0, 3, 1, 2), y=labels[9:].astype(np.int64))
        np.savez(folder / "test.npz", x=tests.transpose(0, 3, 1, 2), y=test_labels)
    elif form == "residual":
        np.savez(folder / "data_batch_1.npz", residual=_differences(images), labels=labels)
        np.savez(folder / "test_batch.npz", residual=_differences(tests), labels=test_labels)
    else:
        inner = folder / "cifar-10-batches-bin"
        inner.mkdir()
        (inner / "data_batch_1.bin").write_bytes(_records(images, labels))
        (inner / "test_batch.bin").write_bytes(_records(tests, test_labels))
    return images, labels


def _records(images: np.ndarray, labels: np.ndarray) -> bytes:
    return b"".join(
        bytes([label]) + image.transpose(2, 0, 1).tobytes() for image, label in zip(images, labels, strict=True)
    )


def _differences(images: np.ndarray) -> np.ndarray:
    red, green, blue = images.transpose(3, 0, 1, 2)
    planes = np.stack([green, red - green, blue - green])
    columns = np.diff(planes, axis=3, prepend=np.uint8(0))
    return np.diff(columns, axis=2, prepend=np.uint8(0))


@pytest.mark.parametrize("form", ["nhwc", "nchw", "residual", "binary"])
def test_every_format_gives_the_same_images(tmp_path: Path, form: str) -> None:
    images, labels = _write(tmp_path, form)
    read, read_labels = read_images(tmp_path, "train")
    assert np.array_equal(read, images.transpose(0, 3, 1, 2))
    assert np.array_equal(read_labels, labels)
    assert len(read_images(tmp_path, "test")[1]) == 5


def test_validation_images_come_from_training_and_never_from_test(tmp_path: Path) -> None:
    images, _ = _write(tmp_path, "nhwc")
    data = CIFAR10DataModule(str(tmp_path), validation_size=6)
    data.prepare_data()
    for stage in ("fit", "test"):
        data.setup(stage)
    train, validation = data.train_dataloader().dataset.images, data.val_dataloader().dataset.images
    assert (len(train), len(validation), len(data.test_dataloader().dataset)) == (14, 6, 5)
    together = sorted(image.numpy().tobytes() for image in torch.cat([train, validation]))
    assert together == sorted(image.transpose(2, 0, 1).tobytes() for image in images)
    again = CIFAR10DataModule(str(tmp_path), validation_size=6)
    again.setup("validate")
    assert torch.equal(again.val_dataloader().dataset.images, validation)


def _corrupt(name: str):
    images, labels = _images(4)
    return {
        "labels": ({"images": images}, "needs whole-number labels"),
        "images": ({"labels": labels}, "needs uint8 images"),
        "float images": ({"images": images / 255, "labels": labels}, "needs uint8 images"),
        "count": ({"images": images, "labels": labels[:3]}, "4 images and 3 labels"),
        "channels": ({"images": images[..., :2], "labels": labels}, "neither 1 nor 3 channels"),
        "pickle": ({"images": np.array([None] * 4), "labels": labels}, "allow_pickle=False"),
        "residual": ({"residual": images, "labels": labels}, "'residual' must be"),
    }[name]


@pytest.mark.parametrize("name", ["labels", "images", "float images", "count", "channels", "pickle", "residual"])
def test_file_that_is_not_images_is_refused(tmp_path: Path, name: str) -> None:
    arrays, message = _corrupt(name)
    np.savez(tmp_path / "train.npz", **arrays)
    with pytest.raises(ValueError, match=message):
        read_images(tmp_path, "train")


def test_cut_binary_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "data_batch_1.bin").write_bytes(b"0" * 3000)
    with pytest.raises(ValueError, match="3000 bytes, which is no multiple of 3073"):
        read_images(tmp_path, "train")


def test_empty_folder_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no train images in .* Looked for: train\*\.npz"):
        CIFAR10DataModule(str(tmp_path)).prepare_data()


def test_sizes_that_leave_nothing_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="validation_size=0 must be at least 1"):
        CIFAR10DataModule(validation_size=0)
    with pytest.raises(ValueError, match="is no folder"):
        CIFAR10DataModule(str(tmp_path / "none"))
    _write(tmp_path, "nhwc")
    with pytest.raises(ValueError, match="validation_size=20 leaves nothing"):
        CIFAR10DataModule(str(tmp_path), validation_size=20).setup("fit")


def _archive(path: Path, names: list[str]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for number, name in enumerate(names):
            content = _records(*_images(4, seed=number))
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def _serve(monkeypatch: pytest.MonkeyPatch, path: Path, digest: str | None = None) -> None:
    monkeypatch.setattr(cifar10, "_URL", path.as_uri())
    monkeypatch.setattr(cifar10, "_SIZE_BYTES", path.stat().st_size)
    monkeypatch.setattr(cifar10, "_SHA256", digest or hashlib.sha256(path.read_bytes()).hexdigest())


def test_download_checks_and_takes_only_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"cifar-10-batches-bin/{name}" for name in cifar10._MEMBERS]
    _archive(tmp_path / "archive.tar.gz", [*names, "../escaped.bin"])
    _serve(monkeypatch, tmp_path / "archive.tar.gz")
    monkeypatch.chdir(tmp_path)
    data = CIFAR10DataModule(validation_size=4)
    data.prepare_data()
    data.setup("fit")
    assert len(data.train_dataloader().dataset) == 16
    assert sorted(path.name for path in (tmp_path / "data").rglob("*") if path.is_file()) == sorted(cifar10._MEMBERS)
    # A second time nothing is fetched.
    (tmp_path / "archive.tar.gz").unlink()
    CIFAR10DataModule(validation_size=4).prepare_data()


def test_download_of_something_else_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _archive(tmp_path / "archive.tar.gz", ["cifar-10-batches-bin/data_batch_1.bin"])
    _serve(monkeypatch, tmp_path / "archive.tar.gz", digest="0" * 64)
    with pytest.raises(ValueError, match="not the published 0000"):
        fetch(tmp_path / "data")
    assert not [path for path in (tmp_path / "data").rglob("*") if path.is_file()]


def test_download_that_fails_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cifar10, "_URL", (tmp_path / "none.tar.gz").as_uri())
    monkeypatch.setattr(cifar10, "download", partial(download, pause_s=0.0))
    with pytest.raises(OSError, match=r"could not be downloaded .* give its folder as data\.folder"):
        fetch(tmp_path / "data")


def test_augmentation_mirrors_and_shifts_whole_images() -> None:
    torch.manual_seed(0)
    # Every pixel of an image carries its own value, and every image its own hundred.
    image = torch.arange(1, 65).reshape(1, 1, 8, 8)
    images = (image + torch.arange(50)[:, None, None, None] * 100).float()
    changed = mirror_and_shift(images, 2)
    assert changed.shape == images.shape
    padded = nn.functional.pad(images, (2, 2, 2, 2))
    seen = set()
    for sample, original in zip(changed, padded, strict=True):
        for mirrored in (False, True):
            source = original.flip(-1) if mirrored else original
            for row in range(5):
                for column in range(5):
                    if torch.equal(sample, source[:, row : row + 8, column : column + 8]):
                        seen.add((mirrored, row, column))
                        break
    assert len(seen) > 20
    assert {mirrored for mirrored, _, _ in seen} == {False, True}


def test_only_training_batches_are_augmented(tmp_path: Path) -> None:
    _write(tmp_path, "nhwc")

    class Watch(L.Callback):
        def __init__(self) -> None:
            self.known: dict[str, bool] = {}

        def _look(self, stage: str, data: CIFAR10DataModule, images: torch.Tensor) -> None:
            originals = {image.numpy().tobytes() for part in data._sets.values() for image in part.images}
            self.known[stage] = all(image.byte().numpy().tobytes() in originals for image in images)

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            self._look("train", trainer.datamodule, batch[0])

        def on_validation_batch_start(self, trainer, pl_module, batch, batch_idx, dataloader_idx=0):
            self._look("validation", trainer.datamodule, batch[0])

    watch = Watch()
    trainer = L.Trainer(
        max_steps=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        callbacks=[watch],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = Classifier(nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 10)))
    trainer.fit(task, CIFAR10DataModule(str(tmp_path), validation_size=6))
    assert watch.known == {"validation": True, "train": False}


def test_classifier_learns_the_digits(tmp_path: Path) -> None:
    L.seed_everything(0)
    trainer = L.Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task, data = Classifier(DigitsCNN(), learning_rate=0.01), DigitsDataModule()
    trainer.fit(task, data)
    assert trainer.callback_metrics["val_acc"] > 0.9
    assert trainer.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.0)
    (result,) = trainer.test(task, data, verbose=False)
    assert result["test_acc"] > 0.9
    assert torch.cat(trainer.predict(task, data)).shape == (360,)
