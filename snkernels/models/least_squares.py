"""The least-squares start of the stitches: streamed, in float64, for every cut in one pass.

A stitch starts as the affine map that best predicts the tokens at a boundary of one anchor from
those at the paired boundary of the other.  All that its solution needs are the count, the mean and
the centred second moments of the two token streams side by side, so any number of images goes
through in batches, and one set of moments serves both directions of a cut.

Source: Pan et al., "Stitched ViTs are Flexible Vision Backbones", ECCV 2024, which takes the
pseudo-inverse in float32 on 100 images.  Real ViTs have massive activations and nearly dependent
channels; hence float64, channels scaled to one unit, and a solve that leaves out what the data do
not determine.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from snkernels import collectives
from snkernels.integers import integer
from snkernels.models.anchors import Anchor, check_images, embed, run_blocks
from snkernels.progress import progress_bar
from snkernels.routing.space import Stitch, StitchingSpace


@dataclass
class Moments:
    """Count, mean and centred second moments of a stream of rows, in float64.

    Two sets are merged by the update of Chan, Golub and LeVeque (1983): no sum of raw squares, so a
    large mean costs no digits.

    Attributes:
        count: Rows seen.
        mean: Their mean, (width,).
        centred: Sum of the outer products of the rows less their mean, (width, width).
    """

    count: int
    mean: Tensor
    centred: Tensor

    @classmethod
    def none(cls, width: int, device: torch.device | str = "cpu") -> Moments:
        """Return the moments of no rows."""
        mean = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0, mean, mean.new_zeros(width, width))

    @classmethod
    def of(cls, rows: Tensor) -> Moments:
        """Return the moments of rows (n, width) of any floating dtype."""
        rows = rows.double()
        mean = rows.mean(0)
        rows = rows - mean
        return cls(rows.shape[0], mean, rows.T @ rows)

    def merge(self, other: Moments) -> None:
        """Take in all rows of ``other``."""
        if other.count == 0:
            return
        count = self.count + other.count
        step = other.mean - self.mean
        self.centred += other.centred
        self.centred.addr_(step, step, alpha=self.count * other.count / count)
        self.mean += step * (other.count / count)
        self.count = count

    def gather(self) -> Moments:
        """Return the moments of the rows of all ranks, merged in rank order: equal on all ranks.

        Without ``torch.distributed`` these are the moments themselves.
        """
        if not collectives.distributed():
            return self
        packed = torch.cat((self.mean.new_tensor([self.count]), self.mean, self.centred.flatten()))
        width = self.mean.numel()
        total = Moments.none(width, self.mean.device)
        for part in collectives.all_gather(packed):
            centred = part[1 + width :].view(width, width)
            total.merge(Moments(int(part[0]), part[1 : 1 + width], centred))
        return total


def fit(
    small: Anchor,
    large: Anchor,
    space: StitchingSpace,
    images: Tensor | Iterable[Tensor | Sequence[Any]],
    batch_size: int,
    progress: bool,
) -> dict[Stitch, tuple[Tensor, Tensor]]:
    """Solve for every stitch between two anchors; see ``StitchedViT.init_stitches``.

    Returns:
        Weight and bias of each stitch, float64.
    """
    batch_size = integer("batch_size", batch_size, 1)
    items = images.split(batch_size) if isinstance(images, Tensor) else images
    shown = progress_bar(items, "least squares: images", progress)
    with collectives.agreed():
        batches = (_taken(item, small) for item in shown)
        moments = cut_moments(small, large, space.cuts, batches)
    moments = [at_cut.gather() for at_cut in moments]
    columns = (slice(0, small.embed_dim), slice(small.embed_dim, None))
    stitches = [
        Stitch(direction, index)
        for direction, count in enumerate(space.num_stitches)
        for index in range(count)
    ]
    return {
        stitch: solve(
            moments[stitch.index], columns[stitch.direction], columns[1 - stitch.direction]
        )
        for stitch in progress_bar(stitches, "least squares: stitches", progress)
    }


def _taken(item: Any, anchor: Anchor) -> Tensor:
    """Return the images of one item of a loader, checked, where the anchor is."""
    images = item[0] if isinstance(item, Sequence) and item else item
    if not isinstance(images, Tensor):
        raise TypeError(
            "images must give tensors or sequences that begin with one, such as (images, labels), "
            f"got {type(item).__name__}"
        )
    parameter = next(anchor.parameters())
    dtype = parameter.dtype if images.is_floating_point() else images.dtype
    images = images.to(parameter.device, dtype)
    check_images(anchor, images)
    return images


def solve(moments: Moments, inputs: slice, outputs: slice) -> tuple[Tensor, Tensor]:
    """Solve for the affine map from the columns ``inputs`` to the columns ``outputs``.

    The input channels are centred and scaled to unit spread, and the normal equations are solved in
    the eigenvectors of their correlation matrix.  Eigenvalues at or below ``d * eps`` of the
    largest (d inputs, eps of float64), which is the rounding of the matrix itself, are left out:
    among all best maps this is the one of least norm on the scaled channels.  A channel that does
    not vary beyond the rounding of its mean gets weight zero.  The bias makes the means agree.

    Args:
        moments: Moments of input and output rows side by side.
        inputs: Columns of the inputs.
        outputs: Columns of the outputs.

    Returns:
        weight (outputs, inputs) and bias (outputs,), float64.

    Raises:
        ValueError: If there were no rows, or if one held a value that is not finite.
    """
    if moments.count == 0:
        raise ValueError("images must hold at least one image")
    if not (moments.mean.isfinite().all() and moments.centred.isfinite().all()):
        raise ValueError(
            "images must give finite tokens in both anchors, got tokens with NaN or infinity"
        )
    eps = torch.finfo(torch.float64).eps
    covariance = moments.centred[inputs, inputs]
    spread = (covariance.diagonal() / moments.count).sqrt()
    varies = spread > 64 * eps * moments.mean[inputs].abs()
    scale = torch.where(varies, covariance.diagonal().rsqrt(), 0.0)
    values, vectors = torch.linalg.eigh(scale[:, None] * covariance * scale)
    kept = values > len(values) * eps * values[-1]
    inverse = torch.where(kept, values.reciprocal(), 0.0)
    vectors = scale[:, None] * vectors
    weight = (vectors * inverse) @ (vectors.T @ moments.centred[inputs, outputs])
    bias = moments.mean[outputs] - moments.mean[inputs] @ weight
    return weight.T, bias


@torch.no_grad()
def cut_moments(
    small: Anchor, large: Anchor, cuts: Sequence[tuple[int, int]], batches: Iterable[Tensor]
) -> list[Moments]:
    """Run both anchors once over the images and collect the moments at every cut.

    Both anchors advance from cut to cut together, so two token streams are alive at a time.  All
    tokens count, prefix tokens too.

    Args:
        small: Anchor whose tokens fill the first columns of the moments.
        large: Anchor whose tokens fill the rest.
        cuts: Boundaries (of small, of large) that face each other, each later than the last.
        batches: Images (B, C, H, W) on the anchors' device.

    Returns:
        Moments of width ``small.embed_dim + large.embed_dim`` per cut, of this process's images.
    """
    device = next(small.parameters()).device
    width = small.embed_dim + large.embed_dim
    moments = [Moments.none(width, device) for _ in cuts]
    for images in batches:
        streams = [embed(small, images), embed(large, images)]
        done = (0, 0)
        for cut, at_cut in zip(cuts, moments, strict=True):
            streams = [
                run_blocks(vit, tokens, start, stop)
                for vit, tokens, start, stop in zip((small, large), streams, done, cut, strict=True)
            ]
            done = cut
            rows = torch.cat([tokens.double() for tokens in streams], dim=-1).flatten(0, 1)
            at_cut.merge(Moments.of(rows))
    return moments
