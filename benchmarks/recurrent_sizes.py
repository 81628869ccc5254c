"""Bytes of files with one recurrent layer of 64 units fed 64 values, by the number of its steps.

    python benchmarks/recurrent_sizes.py [--steps 1 16 64] [--kinds GRU LSTM] [--float]

Each file is written, read back, and run on one sample; a line says how far its values, which lie between -1 and 1, then
lay from its network's.
"""

from __future__ import annotations

import argparse
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor, nn

from lightning_edge import exporters, quantize
from lightning_edge.exporters import TARGETS
from lightning_edge.wording import counted

UNITS = 64


class Last(nn.Module):
    """The last step of a layer over a sequence."""

    def __init__(self, kind: type[nn.GRU] | type[nn.LSTM]) -> None:
        super().__init__()
        self.memory = kind(UNITS, UNITS, batch_first=True)

    def forward(self, sequence: Tensor) -> Tensor:
        """Map (N, steps, 64) to (N, 64)."""
        last: Tensor = self.memory(sequence)[0][:, -1]
        return last


def main() -> None:
    """Print a line for each file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 16, 64])
    parser.add_argument("--kinds", nargs="+", choices=["GRU", "LSTM"], default=["GRU", "LSTM"])
    parser.add_argument("--float", action="store_true", help="float files instead of int8 ones")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    for steps in given.steps:
        for kind in given.kinds:
            torch.manual_seed(0)
            sequence = torch.randn(8, steps, UNITS)
            network = Last(getattr(nn, kind)).eval()
            model = network if given.float else quantize(network, [sequence])
            candidate = exporters.deployable(model, sequence if given.float else None)
            for target in TARGETS:
                with tempfile.TemporaryDirectory() as folder:
                    path = Path(folder) / f"net{exporters.target(target).suffix}"
                    with exporters.stage(candidate, target, path, isolated=False) as staged:
                        artifact = staged.artifact
                        difference = (artifact.run([sequence[:1]])[0] - candidate.graph(sequence[:1])).abs().max()
                        print(
                            f"{kind}, {counted(steps, 'step')}, {target}: {artifact.size_bytes:,} bytes, "
                            f"{artifact.contents.int8_weight_bytes:,} of int8 weights, off by {difference:.2g}",
                            flush=True,
                        )


if __name__ == "__main__":
    main()
