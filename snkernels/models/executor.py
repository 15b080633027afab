"""Runs a plan: its calls, one after another, on the anchors and stitches of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from snkernels.kernels.on_device import on_device
from snkernels.layers import StitchingLayer
from snkernels.models.anchors import Anchor, embed, finish, run_blocks
from snkernels.models.blocks import entry_norm
from snkernels.models.modes import no_grad
from snkernels.routing.plan import Blocks, Call, Embed, Gather, Plan, Readout, Rows, Switch
from snkernels.routing.space import Stitch

# Rows that go through blocks together at most in the memory of a CPU.
_SLICE = 10


def execute(
    plan: Plan,
    anchors: Sequence[Anchor],
    stitch: Callable[[Stitch], StitchingLayer],
    images: Tensor,
) -> Tensor:
    """Run a plan on images (batch, channels, height, width).

    Args:
        plan: What ``snkernels.routing.plan.plan`` made of samples and routes.
        anchors: The small and the large anchor.
        stitch: Gives the layer of a stitch.
        images: Images of all samples that the plan names.

    Returns:
        Logits (rows, classes), a row for each pair of sample and route, in the caller's order.
    """
    run = _Run(plan, anchors, stitch, images)
    for call in plan.calls:
        run.make(call)
    logits = _joined(run.outputs)
    if plan.order == range(len(logits)):
        return logits
    return logits.index_select(0, on_device(tuple(plan.order), logits.device))


class _Tokens(NamedTuple):
    """A value of the plan: the residual stream (rows, N, width), and its norm where known."""

    h: Tensor
    normed: Tensor | None = None


def slices(vit: Anchor, h: Tensor, normed: Tensor | None) -> list[tuple[Tensor, Tensor | None]]:
    """Cut tokens and their norm into what goes through blocks one after another.

    All at once where nothing is gained.  A CPU's cache holds what lies between the GEMMs of a few
    images, and its allocator keeps buffers of that size, where it would ask the system for larger
    ones each time anew.  In training each branch draws its masks for all rows.

    Args:
        vit: The anchor whose blocks they are for.
        h: The residual stream (B, N, width).
        normed: Its norm, where that is known.
    """
    count = -(-len(h) // _SLICE)
    if count == 1 or h.device.type != "cpu" or vit.training or torch.is_grad_enabled():
        return [(h, normed)]
    norms = [None] * count if normed is None else normed.tensor_split(count)
    return list(zip(h.tensor_split(count), norms, strict=True))


class _Run:
    """The values that are alive while a plan runs."""

    def __init__(
        self,
        plan: Plan,
        anchors: Sequence[Anchor],
        stitch: Callable[[Stitch], StitchingLayer],
        images: Tensor,
    ) -> None:
        self.anchors, self.stitch, self.images = anchors, stitch, images
        self.tokens: dict[int, _Tokens] = {}
        self.logits: dict[int, Tensor] = {}
        self.outputs: list[Tensor] = []
        # What is gathered is copied anyway, so it is normalised after that, all rows at once.
        self.gathered = {
            piece.value for call in plan.calls if isinstance(call, Gather) for piece in call.pieces
        }

    def make(self, call: Call) -> None:
        if getattr(call, "graded", True) or not torch.is_grad_enabled():
            self._make(call)
        else:
            with no_grad(self.images.device.type):
                self._make(call)

    def _make(self, call: Call) -> None:
        match call:
            case Embed(anchor, samples, out):
                if isinstance(samples, range):
                    images = self.images[samples.start : samples.stop]
                else:
                    chosen = on_device(tuple(samples), self.images.device)
                    images = self.images.index_select(0, chosen)
                self.tokens[out] = _Tokens(embed(self.anchors[anchor], images))
            case Blocks(anchor, start, stop, value):
                vit = self.anchors[anchor]
                parts = slices(vit, *self.tokens.pop(value))
                if stop < len(vit.blocks):
                    outs = [run_blocks(vit, h, start, stop, normed) for h, normed in parts]
                    self.tokens[value] = _Tokens(_joined(outs))
                else:
                    outs = [finish(vit, h, start, normed) for h, normed in parts]
                    self.logits[value] = _joined(outs)
            case Switch(stitch, block, rows, out, last):
                # One by one: the two directions of a level end in different widths, and all that
                # crosses in one direction there takes the same stitch, so nothing is to be grouped.
                source = self.tokens.pop(rows.value) if last else self.tokens[rows.value]
                h = source.h[rows.start : rows.stop]
                norm = entry_norm(self.anchors[1 - stitch.direction].blocks[block])
                if norm is None or out in self.gathered:
                    self.tokens[out] = _Tokens(self.stitch(stitch)(h))
                else:
                    self.tokens[out] = _Tokens(*self.stitch(stitch).forward_norm(h, norm))
            case Gather(pieces=pieces, out=out):
                h = torch.cat([self._piece(piece) for piece in pieces])
                for value in {piece.value for piece in pieces}:
                    del self.tokens[value]
                self.tokens[out] = _Tokens(h)
            case Readout(value=value):
                self.outputs.append(self.logits.pop(value))

    def _piece(self, rows: Rows) -> Tensor:
        """Return rows of a value; no gradient goes back through those that nobody asks one of."""
        h = self.tokens[rows.value].h[rows.start : rows.stop]
        return h if rows.graded else h.detach()


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
