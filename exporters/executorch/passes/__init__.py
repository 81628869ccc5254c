"""Passes of the ExecuTorch target: one tuple for each backend, in order."""

from __future__ import annotations

from lightning_edge.exporters.executorch.passes.activations import (
    clamp_as_hardtanh,
    multiply_cubes,
    write_out_softplus,
    write_out_tanh_gelu,
)
from lightning_edge.exporters.executorch.passes.attention import flatten_softmax, write_out_attention
from lightning_edge.exporters.executorch.passes.contiguous_constants import lay_out_constants
from lightning_edge.exporters.executorch.passes.norms import write_out_layer_norm
from lightning_edge.exporters.executorch.passes.pooling import (
    average_whole_images,
    keep_dimensions_of_extremes,
    keep_dimensions_of_means,
)
from lightning_edge.exporters.executorch.passes.shapes import (
    drop_single_repeats,
    drop_whole_slices,
    join_rolled_parts,
    join_upsampled_rows,
    slice_selections,
    slice_splits,
    view_squeezes,
)
from lightning_edge.exporters.passes.trim_kernels import trim_kernels

# For Core ML and portable kernels.
COMMON_PASSES = (
    lay_out_constants,  # ExecuTorch's kernels refuse two layouts in one operation
    trim_kernels,  # weights that only meet padding are left out
)
# For XNNPACK.
PASSES = (
    *COMMON_PASSES,
    write_out_layer_norm,  # gives means
    write_out_attention,  # gives a softmax
    keep_dimensions_of_means,  # XNNPACK's mean keeps its dimensions
    keep_dimensions_of_extremes,  # so do its largest and smallest
    average_whole_images,  # it has no pool of a whole image in int8
    flatten_softmax,  # the lowering mixes up its axis in NHWC
    view_squeezes,  # from here on: moves that it has as views, slices and concatenations
    drop_single_repeats,
    drop_whole_slices,
    slice_selections,
    slice_splits,
    join_rolled_parts,
    clamp_as_hardtanh,  # from here on: activations that it has under other names
    multiply_cubes,
    write_out_softplus,
    write_out_tanh_gelu,
    join_upsampled_rows,  # last: its views need no other pass
)
# Vulkan takes the same means and softmax, and all else as it is.
VULKAN_PASSES = (*COMMON_PASSES, keep_dimensions_of_means, average_whole_images, flatten_softmax)
