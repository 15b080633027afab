"""What a ViT must offer to be an anchor, and how an anchor is run.

An anchor embeds images, runs its pre-norm blocks one after another, and reads tokens out as logits.
``PlainViT`` and timm's ``VisionTransformer`` name these parts alike, so one set of functions serves
both, and everything a timm model does beside its blocks (registers, position resampling, patch
dropout, a norm before the blocks, pooling, head dropout) happens in its own methods.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from snkernels.models.blocks import Block, BlockParts, Stream, is_plain_norm, parts_of, run_block
from snkernels.ops.library import autocasts
from snkernels.routing.cost import ViTShape

# An nn.Module that `check_anchor` accepts; which parts that means no type of torch can say.
Anchor: TypeAlias = Any

_VIT_PARTS = ("patch_embed", "_pos_embed", "blocks", "norm", "forward_head", "head")
_VIT_FACTS = ("embed_dim", "num_classes", "num_prefix_tokens", "global_pool")
# Classes whose head reads the first token and no other where ``global_pool`` is "token".
_HEADS = {"snkernels.models.vit.PlainViT", "timm.models.vision_transformer.VisionTransformer"}
_BLOCK_PARTS = (
    "norm1",
    "attn",
    "ls1",
    "drop_path1",
    "norm2",
    "mlp",
    "ls2",
    "drop_path2",
)


def check_anchor(vit: Anchor, name: str) -> None:
    """Check that ``vit`` can be run by this module.

    Args:
        vit: The model to check.
        name: What the caller calls it; errors name it so.

    Raises:
        TypeError: If it lacks a part; the message names the part and what it is for.
    """
    kind = f"{name} ({type(vit).__name__})"
    missing = [part for part in _VIT_PARTS + _VIT_FACTS if not hasattr(vit, part)]
    if missing:
        raise TypeError(
            f"{kind} must be a plain ViT such as PlainViT or timm's VisionTransformer; "
            f"it has no {', '.join(missing)}"
        )
    if getattr(vit, "attn_pool", None) is not None:
        raise TypeError(
            f"{kind} must pool by its class token or a mean over tokens; it has an attention pool"
        )
    if vit.patch_embed.patch_size[0] != vit.patch_embed.patch_size[1]:
        raise TypeError(f"{kind} must have square patches, got {vit.patch_embed.patch_size}")
    for i, block in enumerate(vit.blocks):
        where = f"{kind}, block {i} ({type(block).__name__}),"
        missing = [part for part in _BLOCK_PARTS if not hasattr(block, part)]
        if missing:
            raise TypeError(
                f"{where} must be a pre-norm block, attention after norm1 and then an MLP after "
                f"norm2, each with LayerScale and DropPath or an identity; it has no "
                f"{', '.join(missing)}"
            )
        if not isinstance(block.norm1, nn.LayerNorm):
            raise TypeError(
                f"{where} must have a LayerNorm as norm1, the stitch in front of it computes it; "
                f"it has {type(block.norm1).__name__}"
            )
        missing = [part for part in ("fc1", "act", "fc2") if not hasattr(block.mlp, part)]
        if missing:
            raise TypeError(
                f"{where} must have an MLP of fc1, act and fc2; it has no {', '.join(missing)}"
            )


def check_pair(small: Anchor, large: Anchor) -> None:
    """Check that both anchors read the same images as the same tokens into the same classes.

    Raises:
        TypeError: If one of them is no anchor.
        ValueError: If they differ; the message says in what.
    """
    check_anchor(small, "small")
    check_anchor(large, "large")
    for name, read in (
        ("image size", lambda vit: tuple(vit.patch_embed.img_size)),
        ("fixed image size", lambda vit: getattr(vit.patch_embed, "strict_img_size", True)),
        ("image channels", lambda vit: vit.patch_embed.proj.weight.shape[1]),
        ("patch grid", lambda vit: tuple(vit.patch_embed.grid_size)),
        ("prefix tokens", lambda vit: vit.num_prefix_tokens),
        ("classes", lambda vit: vit.num_classes),
        ("outputs", _outputs),
        ("dtype", lambda vit: next(vit.parameters()).dtype),
        ("device", lambda vit: next(vit.parameters()).device),
    ):
        if read(small) != read(large):
            raise ValueError(
                f"small and large must agree in {name}, got {read(small)} and {read(large)}"
            )


def _outputs(vit: Anchor) -> int:
    """Return the number of outputs, which without a head are features."""
    return vit.embed_dim if isinstance(vit.head, nn.Identity) else vit.num_classes


def check_images(vit: Anchor, images: Tensor) -> None:
    """Check that ``images`` is what ``vit`` embeds: floats (B, channels, height, width).

    Raises:
        TypeError: If it is no tensor of floats, or not of the anchor's dtype without autocast.
        ValueError: If it has another shape, or is on another device; the message gives both.
    """
    if not isinstance(images, Tensor):
        raise TypeError(f"images must be a tensor, got {type(images).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, got {images.dtype}")
    weight = vit.patch_embed.proj.weight
    if images.device != weight.device:
        raise ValueError(f"images must be on {weight.device} as the model, got {images.device}")
    double = torch.float64 in (images.dtype, weight.dtype)  # which autocast leaves alone
    if images.dtype != weight.dtype and (double or not autocasts(weight.device.type)):
        raise TypeError(f"images must be {weight.dtype} as the model, got {images.dtype}")
    patch_embed = vit.patch_embed
    channels = patch_embed.proj.weight.shape[1]
    if getattr(patch_embed, "strict_img_size", True):
        height, width = patch_embed.img_size
        wanted, fits = f"{height}, {width}", tuple(images.shape[2:]) == (height, width)
    elif patch_embed.dynamic_img_pad:
        wanted, fits = "H, W", True
    else:
        side = patch_embed.patch_size[0]
        wanted = f"H, W multiples of {side}"
        fits = all(size % side == 0 for size in images.shape[2:])
    if images.ndim != 4 or images.shape[1] != channels or not fits:
        raise ValueError(
            f"images must have shape (batch, {channels}, {wanted}), got {tuple(images.shape)}"
        )


def image_shape(vit: Anchor) -> tuple[int, int, int]:
    """Return channels, height and width of the images that an anchor was made for."""
    return vit.patch_embed.proj.weight.shape[1], *vit.patch_embed.img_size


def vit_shape(vit: Anchor) -> ViTShape:
    """Return the numbers that the cost of an anchor depends on.

    A gated MLP counts with its two matrices, so its ratio is their mean width over ``embed_dim``.
    """
    patches = vit.patch_embed.num_patches
    mlp = vit.blocks[0].mlp
    return ViTShape(
        embed_dim=vit.embed_dim,
        depth=len(vit.blocks),
        tokens=patches + vit.num_prefix_tokens,
        patches=patches,
        patch_size=vit.patch_embed.patch_size[0],
        in_chans=vit.patch_embed.proj.weight.shape[1],
        num_classes=vit.num_classes,
        mlp_ratio=(mlp.fc1.out_features + mlp.fc2.in_features) / (2 * vit.embed_dim),
    )


def describe(vit: Anchor) -> dict[str, Any]:
    """Return what a state dict does not say of an anchor but its logits depend on, as JSON."""
    return {
        "class": type(vit).__qualname__,
        "img_size": list(vit.patch_embed.img_size),
        "patch_size": vit.patch_embed.patch_size[0],
        "num_heads": [block.attn.num_heads for block in vit.blocks],
        "norm_eps": [block.norm1.eps for block in vit.blocks],
        "act": type(vit.blocks[0].mlp.act).__qualname__,
        "global_pool": vit.global_pool,
    }


def embed(vit: Anchor, images: Tensor) -> Tensor:
    """Map images (B, C, H, W) to the tokens (B, N, embed_dim) that enter the first block."""
    tokens = vit._pos_embed(vit.patch_embed(images))
    for name in ("patch_drop", "norm_pre"):
        if hasattr(vit, name):
            tokens = getattr(vit, name)(tokens)
    return tokens


def run_blocks(
    vit: Anchor, tokens: Tensor, start: int, stop: int, normed: Tensor | None = None
) -> Tensor:
    """Run blocks ``start`` to ``stop - 1`` on tokens (B, N, embed_dim).

    Args:
        vit: The anchor.
        tokens: The residual stream before block ``start``.
        start: First block that runs.
        stop: First block that does not.
        normed: The ``entry_norm`` of block ``start`` of the tokens, where a stitch has computed it.

    Returns:
        The residual stream after block ``stop - 1``, (B, N, embed_dim).
    """
    tokens, _ = _chain(vit, list(vit.blocks)[start:stop], [tokens, normed])
    return tokens


def finish(vit: Anchor, tokens: Tensor, start: int, normed: Tensor | None = None) -> Tensor:
    """Run the blocks from ``start`` to the last one, and read the tokens out.

    Where the head reads the class token alone, the last block computes no other.

    Args:
        vit: The anchor.
        tokens: The residual stream before block ``start``, (B, N, embed_dim).
        start: First block that runs; there must be one.
        normed: The ``entry_norm`` of block ``start`` of the tokens, where a stitch has computed it.

    Returns:
        Logits (B, classes).
    """
    norm = vit.norm if is_plain_norm(vit.norm) else None
    blocks = list(vit.blocks)[start:]
    # A norm that is no LayerNorm may look at all tokens.
    one_token = norm is not None and _reads_one_token(vit)
    h, normed = _chain(vit, blocks, [tokens, normed], norm, one_token)
    return vit.forward_head(vit.norm(h) if normed is None else normed)


def _reads_one_token(vit: Anchor) -> bool:
    """Whether the head is known to read the class token alone, whatever the others are."""
    methods = [getattr(type(vit), name, None) for name in ("forward_head", "pool")]
    classes = {f"{m.__module__}.{m.__qualname__}".rpartition(".")[0] for m in methods if m}
    own = {"forward_head", "pool"} & vars(vit).keys()
    return vit.global_pool == "token" and classes <= _HEADS and not own


def _chain(
    vit: Anchor,
    blocks: list[Block],
    stream: Stream,
    following: nn.LayerNorm | None = None,
    class_token_only: bool = False,
) -> Stream:
    """Run blocks one after another.

    Where the anchor's ``set_grad_checkpointing`` says so, a block keeps for the backward pass what
    it was given, and is run again there.

    Args:
        vit: The anchor.
        blocks: Those of its blocks that run.
        stream: What goes through them.
        following: The norm that comes after the last one, or None where none does.
        class_token_only: Whether only the first token is read after the last one.
    """
    last = len(blocks) - 1
    parts = [parts_of(b, stream[0], class_token_only and i == last) for i, b in enumerate(blocks)]
    norms = [*(p and p.norm1 for p in parts), following][1:]
    again = getattr(vit, "grad_checkpointing", False) and torch.is_grad_enabled()
    for block, part, norm in zip(blocks, parts, norms, strict=True):
        if again:
            stream[:] = checkpoint(_rerun, block, part, *stream, norm, use_reentrant=False)
        else:
            run_block(block, part, stream, norm)
    return stream


def _rerun(
    block: Block,
    parts: BlockParts | None,
    h: Tensor,
    normed: Tensor | None,
    following: nn.LayerNorm | None,
) -> tuple[Tensor, Tensor | None]:
    stream: Stream = [h, normed]
    run_block(block, parts, stream, following)
    return stream[0], stream[1]


def readout_parameters(vit: Anchor) -> Iterator[nn.Parameter]:
    """Yield the parameters that ``finish`` uses after the blocks."""
    for name in ("norm", "fc_norm", "head"):
        if hasattr(vit, name):
            yield from getattr(vit, name).parameters()


def embed_parameters(vit: Anchor) -> Iterator[nn.Parameter]:
    """Yield the parameters that ``embed`` uses: all that ``finish`` never uses."""
    others = {id(p) for p in vit.blocks.parameters()} | {id(p) for p in readout_parameters(vit)}
    yield from (p for p in vit.parameters() if id(p) not in others)
