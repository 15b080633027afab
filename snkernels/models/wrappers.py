"""The stitched model inside what others wrap around it."""

from __future__ import annotations

from typing import Any

from torch import nn

from snkernels.models.stitched import StitchedViT

# Names under which a wrapper holds the model, its only child: DistributedDataParallel, DataParallel
# and AveragedModel; and torch.compile.
_MODULE, _COMPILED = "module", "_orig_mod"


def inside(model: Any, *, compiled: bool = True) -> StitchedViT:
    """Take off what DistributedDataParallel, an average of weights or torch.compile put around.

    Args:
        model: A stitched model, or one in any of these.
        compiled: Whether torch.compile may be taken off as well.

    Raises:
        TypeError: If it is something else; the message says what to give instead.
    """
    inner = model
    while not isinstance(inner, StitchedViT):
        children: dict[str, Any] = inner._modules if isinstance(inner, nn.Module) else {}
        if len(children) != 1 or not children.keys() <= {_MODULE, _COMPILED}:
            raise TypeError(
                "model must be a StitchedViT, as it is or in DistributedDataParallel, "
                f"got {type(inner).__name__}"
            )
        if _COMPILED in children and not compiled:
            raise TypeError(
                "model must not be wrapped by torch.compile, which makes a graph of its own for "
                "every route: give the model itself, its blocks compiled by model.compile_blocks()"
            )
        (inner,) = children.values()
    return inner
