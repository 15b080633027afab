"""The ops: one file each, which holds the op's whole chain from schema to user function."""

from snkernels.ops.stitch import stitch
from snkernels.ops.stitch_layer_norm import stitch_layer_norm

__all__ = ["stitch", "stitch_layer_norm"]
