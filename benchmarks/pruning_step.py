"""What a cut costs, beside torch-pruning's own; and what a training step costs before and after it.

    python benchmarks/pruning_step.py [--rounds 11]

CPU time, one thread, interleaved, medians. Both make a like cut of a fresh copy: half the network's channels or MACs,
global L2 importance, multiples of eight channels. Theirs is the construction of the pruner and one step, ours plan and
perform. The trial on a copy, which theirs does not have, comes once, with the first batch of a training, and is given
by itself; a cut that is due with that very batch pays for both.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_edge.network import Inputs
from lightning_edge.pruning import Prune
from lightning_edge.schedule import Change, Clock
from lightning_edge.zoo.networks import MobileNetV2, ResNet8


class OneBatch:
    """A batch of random images; there are no gradients for a criterion that needs none."""

    def __init__(self, images: torch.Tensor) -> None:
        self.images = images

    def inputs(self) -> Inputs:
        """Give the images."""
        return Inputs.of(self.images)

    def gradients(self, *, per_sample: bool = False) -> Iterator[dict[str, Any]]:
        """Refuse: this benchmark ranks by weights."""
        raise AssertionError("the l2 criterion asks for no gradients")


def trial(network: nn.Module, images: torch.Tensor, macs: float) -> Change:
    """Try what may be cut, as with the first batch of a training."""
    change = Prune(macs=macs, start=0.5).plan(network, Clock(0, 0.0), [], OneBatch(images))
    assert change is not None
    return change


def cut(network: nn.Module, images: torch.Tensor, macs: float, changes: Sequence[Change] = ()) -> Change:
    """Plan and perform a cut."""
    phase = Prune(macs=macs, start=0.5)
    change = phase.plan(network, Clock(5, 0.5), changes, OneBatch(images))
    assert change is not None
    phase.perform(network, change)
    return change


def theirs(network: nn.Module, images: torch.Tensor, ratio: float) -> None:
    """Build torch-pruning's pruner and take one step."""
    import torch_pruning

    last = [module for module in network.modules() if isinstance(module, nn.Linear)][-1]
    pruner = torch_pruning.pruner.BasePruner(
        network,
        images[:2],
        importance=torch_pruning.importance.MagnitudeImportance(p=2),
        global_pruning=True,
        pruning_ratio=ratio,
        round_to=8,
        ignored_layers=[last],
        in_channel_groups={},
        out_channel_groups={},
        num_heads={},
        channel_groups={},
    )
    pruner.step()


def training_step(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> Callable[[], None]:
    """One training step of a network, with an optimizer of its own."""
    optimizer = torch.optim.SGD(network.parameters(), 1e-5, momentum=0.9)

    def step() -> None:
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def cpu_ms(action: Callable[[], object]) -> float:
    """CPU milliseconds of one call."""
    start = time.process_time()
    action()
    return 1000 * (time.process_time() - start)


def interleaved(actions: Mapping[str, Callable[[], Callable[[], object]]], rounds: int) -> dict[str, float]:
    """Median CPU milliseconds of each action, prepared anew and run in turn; the first round is left out."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(rounds + 1):
        for name, prepare in actions.items():
            times[name].append(cpu_ms(prepare()))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def ways(network: nn.Module, images: torch.Tensor) -> dict[str, Callable[[], Callable[[], object]]]:
    """What is timed, each on a copy of its own."""

    def ready(act: Callable[..., object], amount: float) -> Callable[[], Callable[[], object]]:
        return lambda: partial(act, copy.deepcopy(network), images, amount)

    def tried() -> Callable[[], object]:
        twin = copy.deepcopy(network)
        return partial(cut, twin, images, 0.5, [trial(twin, images, 0.5)])

    return {
        "torch-pruning": ready(theirs, 0.3),
        "cut": tried,
        "trial": ready(trial, 0.5),
        "trial and cut at once": ready(cut, 0.5),
    }


def main() -> None:
    """Print both comparisons for each network."""
    parser = argparse.ArgumentParser(description="CPU time of a cut, and of a training step before and after it")
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(1)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    cases: list[tuple[str, nn.Module, tuple[int, ...]]] = [
        ("ResNet-8, 32x32, batch 64", ResNet8(), (64, 3, 32, 32)),
        ("MobileNetV2 0.35, 96x96, batch 32", MobileNetV2(), (32, 3, 96, 96)),
    ]
    for title, network, shape in cases:
        images, labels = torch.randn(shape), torch.randint(0, 10, shape[:1])

        cuts = interleaved(ways(network, images), rounds)
        print(title)
        for name, milliseconds in cuts.items():
            print(f"  {name:22} {milliseconds:8.1f} ms CPU  {milliseconds / cuts['torch-pruning']:.2f}x")
        whole, pruned = copy.deepcopy(network).train(), copy.deepcopy(network).train()
        change = cut(pruned, images, 0.5)
        steps = {"before": training_step(whole, images, labels), "after": training_step(pruned, images, labels)}

        def ready(step: Callable[[], None]) -> Callable[[], Callable[[], None]]:
            return lambda: step

        times = interleaved({name: ready(step) for name, step in steps.items()}, rounds)
        base, _, after = change["macs"]
        for name, milliseconds in times.items():
            share = (
                f"{milliseconds / times['before']:.2f}x at {(after if name == 'after' else base) / base:.2f}x the MACs"
            )
            print(f"  training step {name:8} {milliseconds:8.1f} ms CPU  {share}")


if __name__ == "__main__":
    main()
