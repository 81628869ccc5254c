"""Images in folders, and backbones of other packages."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

from lightning_edge.errors import MissingExtraError
from lightning_edge.zoo import image_folder
from lightning_edge.zoo.backbones import TimmBackbone, TorchvisionBackbone, TransformersBackbone
from lightning_edge.zoo.image_folder import ImageFolderDataModule, read_image


def image(path: Path, color: tuple[int, int, int] = (255, 0, 51), size: tuple[int, int] = (20, 10)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path)
    return path


def test_images_are_divided_by_a_seed(tmp_path: Path) -> None:
    for number in range(10):
        image(tmp_path / ("person" if number % 2 else "none") / f"{number}.{'png' if number % 3 else 'jpg'}")
    (tmp_path / "person" / "notes.txt").write_text("no image")
    data = ImageFolderDataModule(str(tmp_path), size=8, validation_share=0.3, batch_size=4)
    data.setup("fit")
    parts = [loader.dataset.samples for loader in (data.train_dataloader(), data.val_dataloader())]  # type: ignore[attr-defined]
    assert [len(part) for part in parts] == [7, 3]
    assert len({path for part in parts for path, _ in part}) == 10
    assert all(label == (path.parent.name == "person") for part in parts for path, label in part)
    pixels, labels = next(iter(data.val_dataloader()))
    assert (pixels.shape, pixels.dtype, labels.shape) == ((3, 3, 8, 8), torch.uint8, (3,))
    values, _ = data.on_after_batch_transfer((pixels, labels), 0)
    assert (values.mean((0, 2, 3)) - torch.tensor([1.0, 0.0, 0.2])).abs().max() < 0.02
    with pytest.raises(FileNotFoundError, match="has no test images"):
        data.test_dataloader()


def test_folders_of_parts_are_kept(tmp_path: Path) -> None:
    for part, count in (("train", 3), ("val", 2), ("test", 1)):
        for name in ("a", "b"):
            for number in range(count):
                image(tmp_path / part / name / f"{number}.png")
    data = ImageFolderDataModule(str(tmp_path), size=8)
    data.setup("test")
    sizes = [len(loader.dataset) for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader())]  # type: ignore[arg-type]
    assert sizes == [6, 4, 2]
    (tmp_path / "test" / "b").rename(tmp_path / "test" / "c")
    with pytest.raises(ValueError, match=r"has the classes \['a', 'c'\], and train/ has \['a', 'b'\]"):
        ImageFolderDataModule(str(tmp_path), size=8).setup("fit")


def test_what_is_no_image_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.png").write_bytes(image(tmp_path / "whole.png", size=(200, 200)).read_bytes()[:60])
    with pytest.raises(ValueError, match=r"a\.png is no image that can be read"):
        read_image(tmp_path / "a.png", 8)
    with pytest.raises(ValueError, match="is a folder and not a file"):
        read_image(tmp_path, 8)
    monkeypatch.setattr(image_folder, "_MOST_PIXELS", 1000)
    with pytest.raises(ValueError, match="200 x 200 pixels; 1,000 are allowed"):
        read_image(tmp_path / "whole.png", 8)
    with pytest.raises(FileNotFoundError, match="has 0 folders"):
        ImageFolderDataModule(str(tmp_path)).setup("fit")


@pytest.mark.parametrize(
    "arguments", [{"size": 4}, {"validation_share": 0.0}, {"batch_size": 0}, {"folder": "nothing"}]
)
def test_settings_out_of_range_are_refused(tmp_path: Path, arguments: dict[str, object]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(arguments))}="):
        ImageFolderDataModule(**{"folder": str(tmp_path), **arguments})  # type: ignore[arg-type]


def test_a_network_of_transformers_gives_logits_of_normalized_images(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32
    )
    config.save_pretrained(tmp_path)
    network = TransformersBackbone(str(tmp_path), num_classes=3, pretrained=False).eval()
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    loaded = TransformersBackbone(str(tmp_path), num_classes=3).eval()
    images = torch.rand(2, 3, 32, 32)
    for each in (network, loaded):
        expected = each.network((images - each.mean) / each.deviation).logits
        assert expected.shape == (2, 3)
        assert torch.equal(each(images), expected)


def test_the_last_layer_of_a_pretrained_network_is_a_new_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision is not among the packages that the tests need: a stand-in gives networks as it does."""

    def get_model(name: str, weights: str | None, num_classes: int = 1000) -> nn.Module:
        layers = [nn.Flatten(), nn.Linear(12, 6)]
        return nn.Sequential(*layers, nn.Linear(6, num_classes)) if name == "net" else nn.Sequential(nn.Flatten())

    monkeypatch.setitem(sys.modules, "torchvision", SimpleNamespace(models=SimpleNamespace(get_model=get_model)))  # type: ignore[arg-type]
    for pretrained in (True, False):
        assert TorchvisionBackbone("net", 3, pretrained)(torch.rand(2, 3, 2, 2)).shape == (2, 3)
    with pytest.raises(ValueError, match="no linear layer to replace"):
        TorchvisionBackbone("flat", 3)


@pytest.mark.parametrize(("build", "name"), [(TimmBackbone, "timm"), (TorchvisionBackbone, "torchvision")])
def test_a_package_that_is_missing_is_named(build, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=f"Install it with: pip install {name}"):
        build("net")
