"""The arena that an int8 ``.tflite`` file needs of TensorFlow Lite Micro, on a processor of 32 bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lightning_edge.exporters.micro import arena
from lightning_edge.exporters.micro.interpreter import persistent_bytes, setup_bytes
from lightning_edge.exporters.micro.scratch import KERNELS, scratch


@dataclass(frozen=True)
class Memory:
    """What a file needs in RAM.

    Attributes:
        activation_bytes: Activations and scratch memory of the reference kernels, as the planner of TensorFlow Lite
            Micro lays them out (`arena.plan`).
        lower_bound_bytes: The most of them that live at one step: what no plan goes below.
        persistent_bytes: What the interpreter keeps beside them (`interpreter.persistent_bytes`).
        arena_bytes: The arena, an upper bound for the reference kernels and CMSIS-NN's: what is planned, or what
            setting up takes where that is more, and what is kept.
    """

    activation_bytes: int
    lower_bound_bytes: int
    persistent_bytes: int
    arena_bytes: int


def memory(model: Any) -> Memory:
    """Tell what a file needs in RAM.

    Args:
        model: A file as `parse` gives it.

    Raises:
        ValueError: If there is more than one graph, a shape is not fixed, or a type has no fixed width.
    """
    activations = arena.activations(model)
    needed = []
    for kernels in KERNELS:
        asked = scratch(model, kernels)
        plan = arena.plan([*activations, *asked])
        kept = persistent_bytes(model, len(asked))
        setup = setup_bytes(model, len(activations) + len(asked), len(asked))
        needed.append((plan, kept, max(plan.activation_bytes, setup) + kept))
    plan, kept, _ = needed[0]
    return Memory(plan.activation_bytes, plan.lower_bound_bytes, kept, max(total for _, _, total in needed))
