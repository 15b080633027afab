"""Multiply-adds of a route, counted exactly as the SN-Netv2 release publishes them.

Counts are for one image with the low-rank part of every stitch merged. Products count one per
multiply-add, a LayerNorm counts 5 per element, and everything else counts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from snkernels.routing.space import Route


@dataclass(frozen=True)
class ViTShape:
    """What the cost of a plain ViT depends on.

    Args:
        embed_dim: Width d.
        depth: Number of blocks.
        tokens: Sequence length N in the blocks, class and register tokens included.
        patches: Number of patches that the embedding projects.
        patch_size: Side of a square patch, in pixels.
        in_chans: Channels of the image.
        num_classes: Outputs of the head.
        mlp_ratio: Hidden width of the MLP over d.
    """

    embed_dim: int
    depth: int
    tokens: int
    patches: int
    patch_size: int
    in_chans: int = 3
    num_classes: int = 1000
    mlp_ratio: float = 4.0


def _layer_norm_flops(shape: ViTShape) -> int:
    return 5 * shape.tokens * shape.embed_dim


def embed_flops(shape: ViTShape) -> int:
    """Patch embedding."""
    return shape.patches * shape.in_chans * shape.patch_size**2 * shape.embed_dim


def block_flops(shape: ViTShape) -> int:
    """One block: 12·N·d² + 2·N²·d + 10·N·d for an MLP ratio of 4."""
    n, d = shape.tokens, shape.embed_dim
    attention = 4 * n * d * d + 2 * n * n * d
    mlp = 2 * n * d * int(shape.mlp_ratio * d)
    return attention + mlp + 2 * _layer_norm_flops(shape)


def stitch_flops(source: ViTShape, target: ViTShape) -> int:
    """One stitch from the width of ``source`` to that of ``target``."""
    return source.tokens * source.embed_dim * target.embed_dim


def head_flops(shape: ViTShape) -> int:
    """Final norm over all tokens, and the classifier on one."""
    return _layer_norm_flops(shape) + shape.embed_dim * shape.num_classes


def route_flops(route: Route, small: ViTShape, large: ViTShape) -> int:
    """Multiply-adds of ``route`` for one image."""
    shapes = (small, large)
    flops = embed_flops(shapes[route.segments[0].anchor])
    for segment in route.segments:
        flops += (segment.stop - segment.start) * block_flops(shapes[segment.anchor])
    for stitch in route.stitches:
        flops += stitch_flops(shapes[stitch.direction], shapes[1 - stitch.direction])
    return flops + head_flops(shapes[route.segments[-1].anchor])


def pareto_front(costs: Sequence[float], scores: Sequence[float]) -> list[int]:
    """Indices of the points that no other point dominates, cheapest first.

    A point dominates another if it costs no more, scores no less, and is better in one of the two.
    Equal points do not dominate each other.

    Raises:
        ValueError: The lengths differ, or a cost or score is NaN.
    """
    if len(costs) != len(scores):
        raise ValueError(
            f"costs and scores must have one length, got {len(costs)} and {len(scores)}"
        )
    for name, values in (("costs", costs), ("scores", scores)):
        for i, value in enumerate(values):
            if math.isnan(value):
                raise ValueError(f"{name} must not be NaN, but {name}[{i}] is")
    front: list[int] = []
    for i in sorted(range(len(costs)), key=lambda i: (costs[i], -scores[i])):
        if (
            not front
            or scores[i] > scores[front[-1]]
            or (costs[i], scores[i]) == (costs[front[-1]], scores[front[-1]])
        ):
            front.append(i)
    return front
