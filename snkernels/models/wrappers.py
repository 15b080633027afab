"""The stitched model inside what others wrap around it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim.swa_utils import AveragedModel

from snkernels.models.stitched import StitchedViT

# What calls the model that it holds, and does nothing else to images and logits.
_WRAPPERS = (nn.parallel.DistributedDataParallel, nn.DataParallel, AveragedModel)
# The name under which torch.compile holds a model; to import its class takes seconds.
_COMPILED = "_orig_mod"


def inside(model: Any, *, compiled: bool = True) -> StitchedViT:
    """Take off what DistributedDataParallel, an average of weights or torch.compile put around.

    Args:
        model: A stitched model, or one in any of these.
        compiled: Whether torch.compile may be taken off as well.

    Raises:
        TypeError: If it is something else; the message says what to give instead.
    """
    inner, is_compiled = model, False
    while not isinstance(inner, StitchedViT):
        if isinstance(inner, _WRAPPERS):
            inner = inner.module
        elif isinstance(inner, nn.Module) and list(inner._modules) == [_COMPILED]:
            inner, is_compiled = inner._modules[_COMPILED], True
        else:
            raise TypeError(
                "model must be a StitchedViT, as it is or in DistributedDataParallel, "
                f"got {type(inner).__name__}"
            )
    if (is_compiled or inner._compiled_call_impl is not None) and not compiled:
        raise TypeError(
            "model must not be compiled as a whole, which makes a graph of its own for every "
            "route: give the model itself, its blocks compiled by model.compile_blocks()"
        )
    return inner
