"""What the tests of the op do not show of the grouped kernels in Triton (see test_stitches.py)."""

import itertools

import pytest
import torch
from cases import EPS, STITCHES, Shape, make
from device import DEVICE
from judge import assert_as_exact_as_torch
from torch import Tensor

from snkernels.backends import use_backend
from snkernels.kernels.triton import configs
from snkernels.kernels.triton.multi_stitch import multi_stitch_forward
from snkernels.kernels.triton.multi_stitch_backward import multi_stitch_backward
from snkernels.ops import StitchGroup, multi_stitch

SHAPE = Shape(40, 20, 24, 4)
NAMES = ("weight", "bias", "lora_A", "lora_B", "norm_weight", "norm_bias")


@pytest.mark.parametrize(
    "offsets",
    [[0, 30, 10, 40], [0, 99, 7, 40], [-5, 3, 20, 90], [40, 40, 0, 0], [7, 7, 7, 7]],
    ids=str,
)
def test_offsets_that_nobody_checked_stay_within_the_rows(offsets: list[int]) -> None:
    """As they may be in a GPU's memory. NaN rows before and after all matrices would show.

    Offsets that rise once they are brought into the rows have the gradients of those.
    """
    t = make(STITCHES["stitch_layer_norm"], SHAPE, torch.float32)
    x, grad = _among_nan(t["x"]), _among_nan(torch.randn(SHAPE.M, SHAPE.N))
    tensors = [t[name] for name in NAMES] * 3

    def forward_and_backward(offsets: list[int]) -> tuple[Tensor, list[Tensor]]:
        arguments = (x, torch.tensor(offsets), tensors, [1.0] * 3)
        y, _, mean, rstd = multi_stitch_forward(*arguments, SHAPE.N, True, EPS)
        saved = map(_among_nan, (y, mean, rstd))
        return y, multi_stitch_backward(grad, grad, *arguments, *saved, [True] * 19)

    y, (grad_x, *grads) = forward_and_backward(offsets)
    written = [row for row in range(SHAPE.M) if any(a <= row < b for a, b in _pairs(offsets))]
    exact = (t["x"] @ (t["weight"] + t["lora_B"] @ t["lora_A"]).t() + t["bias"])[written]
    torch.testing.assert_close(y[written], exact, rtol=1e-4, atol=1e-4)
    assert grad_x[written].isfinite().all()
    assert [g.shape for g in grads] == [p.shape for p in tensors]
    within = [min(max(offset, 0), SHAPE.M) for offset in offsets]
    if within == sorted(within):
        for g, meant in zip(grads, forward_and_backward(within)[1][1:], strict=True):
            assert g.isfinite().all()
            assert torch.equal(g, meant)


def _among_nan(rows: Tensor) -> Tensor:
    """The same rows in memory that holds as many before and after them."""
    before_and_after = torch.full_like(rows, float("nan"))
    return torch.cat((before_and_after, rows, before_and_after))[len(rows) : 2 * len(rows)]


def _pairs(offsets: list[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(offsets))


def test_more_groups_than_one_look_finds() -> None:
    """The search looks at 128 offsets at a time; each group has a bias of its own."""
    sizes = [i % 3 for i in range(300)]
    offsets = [0, *itertools.accumulate(sizes)]
    x, weight = torch.randn(offsets[-1], 8), torch.randn(16, 8)
    bias = torch.randn(300, 16)
    present = [StitchGroup(weight, bias[i]) for i, size in enumerate(sizes) if size]
    distinct = sorted(set(offsets))
    with use_backend("triton"), configs.override("project", BLOCK_M=16, BLOCK_N=16):
        y = multi_stitch(x, torch.tensor(distinct, device=DEVICE), present)
    own = torch.repeat_interleave(bias, torch.tensor(sizes), 0)

    def eager(dtype: torch.dtype) -> Tensor:
        return x.to(dtype) @ weight.to(dtype).t() + own.to(dtype)

    assert_as_exact_as_torch("y", y, eager(torch.float32), eager(torch.float64))
