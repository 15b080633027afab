"""How a pre-norm block is run: one pass over the tokens between any two GEMMs or attentions.

A block adds two branches to the residual stream, and what comes next normalises each sum: norm2,
norm1 of the next block, or the norm before the head.  Here the sum, with LayerScale and stochastic
depth, and that norm are one step, so the stream travels as a pair (h, LN(h)).  Samples whose branch
stochastic depth drops are left out of the branch, not computed and zeroed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from snkernels.backends import choose
from snkernels.layers import is_layer_norm
from snkernels.models.branches import (
    attend_from_class_token,
    in_parts,
    is_one_of,
    is_plain_attention,
    is_untouched,
)
from snkernels.ops import residual_layer_norm
from snkernels.ops.library import OFFERED, device_type

# A module that `anchors.check_anchor` accepts as a block; no type of torch says which parts.
Block: TypeAlias = Any

# The residual stream (B, N, width) before a block, and the norm of it or None where it is not known
# yet. A list, which a block empties and fills anew: kept for a block longer by whoever called it,
# the tensors would cost memory, and where an allocator asks the system for large ones, time.
Stream: TypeAlias = list[Any]

# Classes whose forward is known to be what is done here part by part.
_BLOCKS = frozenset({"snkernels.models.vit.Block", "timm.models.vision_transformer.Block"})
_LAYER_SCALES = frozenset(
    {
        "snkernels.models.vit.LayerScale",
        "timm.layers.layer_scale.LayerScale",
        "timm.models.vision_transformer.LayerScale",
    }
)
_DROP_PATHS = frozenset({"snkernels.models.vit.DropPath", "timm.layers.drop.DropPath"})


def entry_norm(block: Block) -> nn.LayerNorm | None:
    """Return norm1 of a block that can be run part by part; None if it is called as a module.

    It can if it is a block of ``PlainViT`` or timm's ``VisionTransformer``, and those of its parts
    that are not called here are LayerNorm, LayerScale, DropPath or identities that nobody has
    hooked, wrapped or compiled.
    """
    parts = block._modules
    norm = parts["norm1"]
    fits = (
        is_one_of(_BLOCKS, block)
        and is_untouched(block)
        and is_plain_norm(norm)
        and is_plain_norm(parts["norm2"])
        and _is_identity_or_in(parts["ls1"], _LAYER_SCALES)
        and _is_identity_or_in(parts["ls2"], _LAYER_SCALES)
        and _is_identity_or_in(parts["drop_path1"], _DROP_PATHS)
        and _is_identity_or_in(parts["drop_path2"], _DROP_PATHS)
    )
    return norm if fits else None


class BlockParts(NamedTuple):
    """What is run of a block, one after another; None stands for what does nothing in its mode."""

    norm1: nn.LayerNorm
    attention: Callable[[Tensor], Tensor]
    drop_path1: nn.Module | None
    layer_scale1: nn.Module | None
    norm2: nn.LayerNorm
    mlp: Callable[[Tensor], Tensor]
    drop_path2: nn.Module | None
    layer_scale2: nn.Module | None
    first_token_only: bool


def parts_of(block: Block, x: Tensor, class_token_only: bool = False) -> BlockParts | None:
    """Return the parts of a block for tokens like ``x``; None if it is called as a module.

    Asked of all blocks before the first one runs: between two GEMMs the caches hold nothing of the
    interpreter, and the same questions take many times as long. What a hook of one block changes in
    those that follow is seen in the next forward.

    Args:
        block: The block.
        x: Tokens that are on the device and of the dtype of those that come.
        class_token_only: Whether only the first token is read afterwards.  What the others would
            have become is then left out where the block allows it, and N becomes 1.
    """
    norm1 = entry_norm(block)
    if norm1 is None:
        return None
    modules = block._modules
    attention, mlp = modules["attn"], modules["mlp"]
    first_token_only = class_token_only and is_plain_attention(attention)
    if first_token_only:
        # Called as what it was before it was compiled, which for one token it would be anew.
        attention, mlp = partial(attend_from_class_token, attention), mlp._call_impl
    elif _has_kernel("linear", x) and not torch.compiler.is_compiling():
        attention, mlp = in_parts(attention), in_parts(mlp)
    return BlockParts(
        norm1,
        attention,
        _dropping(modules["drop_path1"]),
        _scaling(modules["ls1"]),
        modules["norm2"],
        mlp,
        _dropping(modules["drop_path2"]),
        _scaling(modules["ls2"]),
        first_token_only,
    )


def run_block(
    block: Block, parts: BlockParts | None, stream: Stream, following: nn.LayerNorm | None
) -> None:
    """Run one block on tokens (B, N, width).

    Args:
        block: The block.
        parts: ``parts_of(block, ...)``.
        stream: The residual stream before it; afterwards that after it, and ``following`` of that;
            None where that is None, or where the block has to be called as a module.
        following: The norm that comes after the block, or None where none does.
    """
    h, normed = stream
    stream.clear()
    if parts is None:
        stream += block(h), None
        return
    if normed is None:
        normed = parts.norm1(h)
    if parts.first_token_only:
        h = h[:, :1]
    # Branches have no name, which would keep them while the next one is computed.
    h, normed = _add(
        h, *_branch(parts.attention, normed, parts.drop_path1), parts.layer_scale1, parts.norm2
    )
    stream += _add(h, *_branch(parts.mlp, normed, parts.drop_path2), parts.layer_scale2, following)


def is_plain_norm(norm: nn.Module) -> bool:
    """Whether a norm is a LayerNorm as it was made, so that another op may compute it."""
    return is_layer_norm(norm) and is_untouched(norm)


def _is_identity_or_in(module: nn.Module, classes: frozenset[str]) -> bool:
    known = type(module) is nn.Identity or is_one_of(classes, module)
    return known and is_untouched(module)


def _dropping(drop_path: Any) -> nn.Module | None:
    """Return stochastic depth if it drops anything in its mode."""
    return drop_path if drop_path.training and getattr(drop_path, "drop_prob", 0.0) else None


def _scaling(layer_scale: nn.Module) -> nn.Module | None:
    """Return LayerScale, or None for an identity."""
    return layer_scale if hasattr(layer_scale, "gamma") else None


def _branch(
    module: Callable[[Tensor], Tensor], normed: Tensor, drop_path: Any
) -> tuple[Tensor, Tensor | None]:
    """Return the branch of every sample, and what stochastic depth multiplies it by.

    The mask is drawn as DropPath draws it, so the same generator gives the same mask; but before
    the branch, which matters where that draws too (dropout).  In CPU memory only samples that are
    kept go through the module; a GPU would have to wait for their number.
    """
    if drop_path is None:
        return module(normed), None
    keep = 1.0 - drop_path.drop_prob
    dtype = torch.promote_types(normed.dtype, torch.float32)
    scale = normed.new_empty(normed.shape[0], dtype=dtype).bernoulli_(keep)
    kept = scale.nonzero().squeeze(1) if scale.device.type == "cpu" else None
    if keep > 0.0 and getattr(drop_path, "scale_by_keep", True):
        scale /= keep
    if kept is None:
        return module(normed), scale
    part = module(normed.index_select(0, kept))
    return part.new_zeros(len(scale), *part.shape[1:]).index_copy(0, kept, part), scale


def _add(
    h: Tensor,
    branch: Tensor,
    scale: Tensor | None,
    layer_scale: Any,
    norm: nn.LayerNorm | None,
) -> tuple[Tensor, Any]:
    """Add a branch to the residual stream and normalise the sum, where a norm follows.

    In one pass where there is a kernel for it; what stands for one elsewhere is no faster than
    torch's own LayerNorm.
    """
    gamma = None if layer_scale is None else layer_scale.gamma
    if norm is not None and _has_kernel("residual_layer_norm", h):
        return residual_layer_norm(h, branch, gamma, scale, norm.weight, norm.bias, norm.eps)
    if scale is not None:
        branch = branch * scale.to(branch.dtype).view(-1, 1, 1)
    h = h + branch if gamma is None else torch.addcmul(h, branch, gamma)
    return h, None if norm is None else norm(h)


def _has_kernel(op: str, x: Tensor) -> bool:
    return choose(op, OFFERED[op], device_type(x), x.dtype).backend != "torch"
