"""`Order`: a file that may be written, and the network in the form it is written in."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from torch import nn

from lightning_edge.errors import ExportError
from lightning_edge.exporters.input_adapter import check_interface
from lightning_edge.exporters.program import deployable, in_file_form
from lightning_edge.exporters.target import TARGETS, Target, check_options
from lightning_edge.exporters.target import target as target_of
from lightning_edge.exporters.verify.contents import check_activations, check_share
from lightning_edge.interface import Interface
from lightning_edge.network import Deployable


@final
class Forms:
    """Networks in the form of a file, each made once for all targets that take it so."""

    def __init__(self) -> None:
        self._adapted: dict[tuple[int, Interface, torch.dtype], tuple[Deployable, Deployable]] = {}

    def adapted(self, network: Deployable, interface: Interface, pixel_type: torch.dtype) -> Deployable:
        """Give it in the form of a file of this interface, see `in_file_form`."""
        key = id(network), interface, pixel_type
        if key not in self._adapted:
            # The network is kept, so that its number stays its own.
            self._adapted[key] = in_file_form(network, interface, pixel_type), network
        return self._adapted[key][0]


@dataclass(frozen=True)
class Order:
    """A file that may be written: everything that can be refused before has been looked at.

    Attributes:
        network: What is exported.
        target: Name of the target.
        path: Where the file shall be in the end.
        interface: How it is called.
        max_fallback: As for `stage`.
        options: The target's own options.
        forms: Makes of it what is written.
    """

    network: Deployable
    target: str
    path: Path
    interface: Interface
    max_fallback: float | None
    options: Mapping[str, Any]
    forms: Forms

    @property
    def module(self) -> Target:
        """The target."""
        return target_of(self.target)

    def prepared(self) -> Deployable:
        """Give what the target writes.

        Raises:
            ExportError: If the target refuses the network.
            ValueError: If an option is not allowed.
        """
        adapted = self.forms.adapted(self.network, *self.module.image_input(self.interface))
        return self.module.prepare(adapted, **self.options)


def ordered(
    model: nn.Module,
    target: str,
    path: str | Path,
    *,
    inputs: Any = None,
    max_fallback: float | None = None,
    interface: Interface | None = None,
    forms: Forms | None = None,
    **options: Any,
) -> Order:
    """Look at all that can be refused before a file is written.

    Args:
        model: As for `stage`.
        target: As for `stage`.
        path: As for `stage`.
        inputs: As for `stage`.
        max_fallback: As for `stage`.
        interface: As for `stage`.
        forms: What was made of networks for other targets.
        options: The target's own options.

    Raises:
        ExportError: If the target refuses the network.
        ValueError: If an argument is not allowed.
    """
    module, path = target_of(target), Path(path)
    _check_path(path, target, module)
    check_options(target, options)
    check_share(max_fallback)
    network = deployable(model, inputs)
    check_activations(network, target, module.activation_bits)
    interface = interface or Interface()
    check_interface(interface, network)
    _check_batch_size(interface, target, module)
    scheme = options.get("scheme")
    if scheme is not None and network.precision == "int8":
        raise ValueError(f"scheme={scheme!r} is for float networks, and this one is int8 already; leave it out")
    return Order(network, target, path, interface, max_fallback, options, forms or Forms())


def _check_batch_size(interface: Interface, name: str, module: Target) -> None:
    if interface.max_batch > 1 and not module.takes_batches:
        others = ", ".join(other for other in TARGETS if target_of(other).takes_batches)
        raise ValueError(
            f"{name}: Interface(max_batch={interface.max_batch}) is not allowed: apps call its files with one sample. "
            f"Leave max_batch out, or export to one of: {others}"
        )


def _check_path(path: Path, name: str, module: Target) -> None:
    if path.suffix != module.suffix:
        raise ValueError(f"path={str(path)!r} has the suffix {path.suffix!r}; {name} writes {module.suffix}")
    if path.is_dir() and not module.writes_folder:
        raise ExportError(f"cannot write {path}: a folder is there. Remove it or choose another name.")
