"""A plain vision transformer in the style of DeiT III, with timm's argument and parameter names.

It is here so that nothing but torch is needed to stitch; for any other ViT use timm, whose
``VisionTransformer`` is an anchor too.  A state dict of timm's ``deit3_*`` models loads by name.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snkernels.integers import integer


class PatchEmbed(nn.Module):
    """Cut an image into square patches and project each to a token.

    Args:
        img_size: Height and width of the images, in pixels.
        patch_size: Side of a patch, in pixels; divides height and width.
        in_chans: Channels of the images.
        embed_dim: Width of a token.
    """

    def __init__(
        self, img_size: tuple[int, int], patch_size: int, in_chans: int, embed_dim: int
    ) -> None:
        super().__init__()
        self.img_size = img_size
        self.patch_size = (patch_size, patch_size)
        self.grid_size = (img_size[0] // patch_size, img_size[1] // patch_size)
        self.num_patches = self.grid_size[0] * self.grid_size[1]
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, images: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to patch tokens (B, num_patches, embed_dim)."""
        return self.proj(images).flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention over (B, N, dim) tokens."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised tokens (B, N, dim) to the attention branch (B, N, dim)."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(*qkv.unbind(0))
        return self.proj(attended.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between them."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map normalised tokens (B, N, dim) to the MLP branch (B, N, dim)."""
        return self.fc2(self.act(self.fc1(x)))


class LayerScale(nn.Module):
    """A learned factor per channel on a residual branch (Touvron et al., 2021, "CaiT")."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init_values))

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x * gamma``."""
        return x * self.gamma


class DropPath(nn.Module):
    """Stochastic depth (Huang et al., 2016): zero a sample's branch, scale up the kept ones.

    Args:
        drop_prob: Probability that a sample's branch is dropped while training, in [0, 1).
    """

    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Tensor) -> Tensor:
        """Return the branch (B, ...), in training with whole samples dropped."""
        if not self.training or self.drop_prob == 0.0:
            return x
        keep = 1.0 - self.drop_prob
        mask = x.new_empty((x.shape[0],) + (1,) * (x.ndim - 1)).bernoulli_(keep)
        return x * mask.div_(keep)

    def extra_repr(self) -> str:
        """Show the rate in ``repr``."""
        return f"drop_prob={self.drop_prob:.3g}"


class Block(nn.Module):
    """A pre-norm transformer block: ``h = x + ls1(attn(norm1(x)))``, ``h + ls2(mlp(norm2(h)))``."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        qkv_bias: bool,
        init_values: float | None,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.ls1 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))
        self.ls2 = nn.Identity() if init_values is None else LayerScale(dim, init_values)
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens (B, N, dim) to tokens (B, N, dim)."""
        x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x))))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class PlainViT(nn.Module):
    """A plain ViT with a class token, LayerScale and stochastic depth (DeiT III).

    The position embedding covers the patches only: it is added before the class token is put in
    front, as in timm's ``no_embed_class=True``.  LayerNorms have eps 1e-6.  The head reads the
    normalised class token.

    Args:
        img_size: Side of the images in pixels, or (height, width).
        patch_size: Side of a patch in pixels.
        in_chans: Channels of the images.
        num_classes: Outputs of the head; 0 leaves the head out.
        embed_dim: Width of a token.
        depth: Number of blocks.
        num_heads: Attention heads; divides ``embed_dim``.
        mlp_ratio: Hidden width of the MLPs over ``embed_dim``.
        qkv_bias: Whether the query, key and value projection has a bias.
        init_values: First value of LayerScale; None leaves LayerScale out.
        drop_path_rate: Stochastic depth of the last block, in [0, 1); it grows linearly from 0 at
            the first block.

    Raises:
        ValueError: If a size does not divide as it must or is not positive.

    Source: Touvron, Cord, Jégou, "DeiT III: Revenge of the ViT", ECCV 2022.
    """

    global_pool = "token"
    num_prefix_tokens = 1

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        qkv_bias: bool = True,
        init_values: float | None = 1e-4,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        height, width = img_size if isinstance(img_size, tuple | list) else (img_size, img_size)
        height, width = integer("img_size", height), integer("img_size", width)
        patch_size, in_chans = integer("patch_size", patch_size), integer("in_chans", in_chans)
        embed_dim, num_heads = integer("embed_dim", embed_dim), integer("num_heads", num_heads)
        depth, num_classes = integer("depth", depth), integer("num_classes", num_classes)
        mlp_ratio, drop_path_rate = float(mlp_ratio), float(drop_path_rate)
        init_values = None if init_values is None else float(init_values)
        for name, value in (
            ("img_size", min(height, width)),
            ("patch_size", patch_size),
            ("in_chans", in_chans),
            ("embed_dim", embed_dim),
            ("depth", depth),
            ("num_heads", num_heads),
        ):
            if value < 1:
                raise ValueError(f"{name} must be positive, got {value}")
        if num_classes < 0:
            raise ValueError(f"num_classes must not be negative, got {num_classes}")
        if height % patch_size or width % patch_size:
            raise ValueError(
                f"img_size must be a multiple of patch_size, got {height}x{width} and {patch_size}"
            )
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads, got {embed_dim} and {num_heads}"
            )
        if not 0.0 <= drop_path_rate < 1.0:
            raise ValueError(f"drop_path_rate must be in [0, 1), got {drop_path_rate}")

        self.config: dict[str, Any] = {
            "img_size": [height, width],
            "patch_size": patch_size,
            "in_chans": in_chans,
            "num_classes": num_classes,
            "embed_dim": embed_dim,
            "depth": depth,
            "num_heads": num_heads,
            "mlp_ratio": mlp_ratio,
            "qkv_bias": qkv_bias,
            "init_values": init_values,
            "drop_path_rate": drop_path_rate,
        }
        self.grad_checkpointing = False
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.embed_dim = embed_dim
        self.patch_embed = PatchEmbed((height, width), patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
        self.pos_embed = nn.Parameter(torch.empty(1, self.patch_embed.num_patches, embed_dim))
        self.blocks = nn.Sequential(
            *(
                Block(
                    embed_dim,
                    num_heads,
                    mlp_ratio,
                    qkv_bias,
                    init_values,
                    drop_path_rate * i / max(depth - 1, 1),
                )
                for i in range(depth)
            )
        )
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self._init_weights()

    def reset_classifier(self, num_classes: int) -> None:
        """Put a new head in the place of the old one; do so before the anchor is stitched.

        What the routes of a stitched model cost is reckoned when it is built.

        Args:
            num_classes: Its outputs; 0 leaves it out.

        Raises:
            TypeError: If that is no integer.
            ValueError: If it is negative.
        """
        self.num_classes = self.config["num_classes"] = integer("num_classes", num_classes, 0)
        like = self.cls_token
        self.head = nn.Identity()
        if self.num_classes:
            self.head = nn.Linear(self.embed_dim, self.num_classes).to(like.device, like.dtype)
            nn.init.trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Say whether blocks keep for the backward pass what they are given, and run again there.

        That is the tokens and their norm.  It takes less memory and more time, and it holds where
        the anchor is part of a stitched model.
        """
        self.grad_checkpointing = bool(enable)

    def _init_weights(self) -> None:
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def _pos_embed(self, x: Tensor) -> Tensor:
        """Add positions to patch tokens (B, P, d), put the class token in front: (B, P + 1, d)."""
        return torch.cat((self.cls_token.expand(x.shape[0], -1, -1), x + self.pos_embed), dim=1)

    def forward_features(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to normalised tokens (B, P + 1, embed_dim)."""
        return self.norm(self.blocks(self._pos_embed(self.patch_embed(x))))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Read normalised tokens (B, N, embed_dim) out as logits (B, num_classes).

        With ``pre_logits`` the class token itself, (B, embed_dim), is returned.
        """
        x = x[:, 0]
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Map images (B, in_chans, H, W) to logits (B, num_classes)."""
        return self.forward_head(self.forward_features(x))
