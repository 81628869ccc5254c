"""Whether a network can be quantized at all, tried on a copy with the first batch of training."""

from __future__ import annotations

import random
import warnings

import torch
from torch import nn

from lightning_edge.network import Inputs
from lightning_edge.quantization.network import attach, float_copy
from lightning_edge.quantization.plan import LinearWeights, Plan
from lightning_edge.quantization.post_training import calibrate

# What Lightning hangs on its modules; a copy looks at the same one.
_SHARED = ("_trainer", "_fabric")


def try_out(network: nn.Module, inputs: Inputs, plan: Plan, linear_weights: LinearWeights) -> None:
    """Quantize a copy of a network and run a batch through it; on several processes all of them have to.

    The network, its hooks and the random state stay out of it. Warnings are left to the time when it is quantized.

    Args:
        network: A float network.
        inputs: A call of it, on its device.
        plan: As for `attach`.
        linear_weights: As for `attach`.

    Raises:
        CompressionError: If the network cannot be copied or captured, has nothing to quantize, or some of its values
            have no int8 range.
    """
    devices = sorted({parameter.device.index or 0 for parameter in network.parameters() if parameter.is_cuda})
    python_state = random.getstate()
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            copied = _without_hooks(float_copy(network))
            for original, twin in zip(network.modules(), copied.modules(), strict=True):
                twin.__dict__.update({name: vars(original)[name] for name in _SHARED if name in vars(original)})
            attach(copied, inputs, plan=plan, linear_weights=linear_weights)
            calibrate(copied, inputs)
    finally:
        random.setstate(python_state)


def _without_hooks(network: nn.Module) -> nn.Module:
    """Drop the hooks of a copy, which belong to the user; not those that compute weights (weight_norm)."""
    for module in network.modules():
        for hooks in (module._forward_hooks, module._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                if not type(hook).__module__.startswith("torch.nn.utils"):
                    del hooks[key]
    return network
