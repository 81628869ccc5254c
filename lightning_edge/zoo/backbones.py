"""Networks of timm, torchvision and transformers as classifiers of images with values 0..1.

None of the three is needed by anything else here; the one that a recipe names must be installed.
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from lightning_edge.errors import MissingExtraError

# What nearly all weights for ImageNet were trained with.
_MEAN, _DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def _package(name: str) -> ModuleType:
    """Import a package, or say how to install it.

    Raises:
        MissingExtraError: If it is not installed.
    """
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingExtraError(
            f"{name!r} cannot be imported ({error}), and this recipe takes its network from there. Install it with: "
            f"pip install {name}"
        ) from error


class _Backbone(nn.Module):
    """A network behind the normalization it was trained with, which is so in the file, too."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(_MEAN)[:, None, None], persistent=False)
        self.register_buffer("deviation", torch.tensor(_DEVIATION)[:, None, None], persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images (N, 3, H, W) with values 0..1."""
        outputs: Any = self.network((images - self.mean) / self.deviation)
        logits: Tensor = getattr(outputs, "logits", outputs)
        return logits


class TimmBackbone(_Backbone):
    """A network of timm.

    Args:
        name: Its name there, such as ``mobilenetv3_small_100``.
        num_classes: Number of logits.
        pretrained: Whether its weights are downloaded; timm reads them from safetensors where there are some.

    Raises:
        MissingExtraError: If timm is not installed.
    """

    def __init__(self, name: str, num_classes: int = 10, pretrained: bool = True) -> None:
        super().__init__(_package("timm").create_model(name, pretrained=pretrained, num_classes=num_classes))


class TorchvisionBackbone(_Backbone):
    """A classifier of torchvision.

    Args:
        name: Its name there, such as ``mobilenet_v3_small``.
        num_classes: Number of logits.
        pretrained: Whether its default weights are downloaded; the last linear layer is then a new one.

    Raises:
        MissingExtraError: If torchvision is not installed.
        ValueError: If the pretrained network has no linear layer to replace.
    """

    def __init__(self, name: str, num_classes: int = 10, pretrained: bool = True) -> None:
        models = _package("torchvision").models
        if not pretrained:
            super().__init__(models.get_model(name, weights=None, num_classes=num_classes))
            return
        network: nn.Module = models.get_model(name, weights="DEFAULT")
        linear = [key for key, module in network.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise ValueError(
                f"name={name!r}: the network has no linear layer to replace; give another, or pretrained: false"
            )
        last = network.get_submodule(linear[-1])
        network.set_submodule(linear[-1], nn.Linear(int(last.in_features), num_classes))  # type: ignore[arg-type]
        super().__init__(network)


class TransformersBackbone(_Backbone):
    """An image classifier of transformers.

    Args:
        name: A model of the hub, such as ``apple/mobilevit-xx-small``, or a folder with its ``config.json``.
        num_classes: Number of logits.
        pretrained: Whether its weights are loaded, from safetensors only. No code of a model is run either way.

    Raises:
        MissingExtraError: If transformers is not installed.
    """

    def __init__(self, name: str, num_classes: int = 10, pretrained: bool = True) -> None:
        transformers = _package("transformers")
        settings: dict[str, Any] = {"num_labels": num_classes}
        models = transformers.AutoModelForImageClassification
        if pretrained:
            settings |= {"ignore_mismatched_sizes": True, "use_safetensors": True, "trust_remote_code": False}
            super().__init__(models.from_pretrained(name, **settings))
            return
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **settings)
        super().__init__(models.from_config(config, trust_remote_code=False))
