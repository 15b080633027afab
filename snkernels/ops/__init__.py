"""The ops: one file each, which holds the op's whole chain from schema to user function."""

from snkernels.ops.linear import linear
from snkernels.ops.multi_stitch import StitchGroup, multi_stitch, multi_stitch_layer_norm
from snkernels.ops.residual_layer_norm import residual_layer_norm
from snkernels.ops.stitch import stitch
from snkernels.ops.stitch_layer_norm import stitch_layer_norm

__all__ = [
    "StitchGroup",
    "linear",
    "multi_stitch",
    "multi_stitch_layer_norm",
    "residual_layer_norm",
    "stitch",
    "stitch_layer_norm",
]
