"""``stitch_layer_norm``: torch's products, and LayerNorm both ways in Triton.

On an H200 torch's GEMM by a merged weight is faster than any of Triton. What is slow about torch
there is LayerNorm, so a pass of our own follows, which finds y in L2. LN(y) is that of the y which
is returned, rounded to its dtype, so that the backward, which has only that y, belongs to exactly
this function.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from snkernels.kernels.triton.operands import operand
from snkernels.kernels.triton.residual_layer_norm import normalize_rows, normalize_rows_backward
from snkernels.reference import stitch, stitch_backward


def stitch_layer_norm_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, LN(y), mean, 1/σ); see :func:`snkernels.reference.stitch` and ``layer_norm``."""
    y = stitch(x, weight, bias, lora_A, lora_B, scaling)
    normed = torch.empty_like(y)
    mean, rstd = (torch.empty(len(y), dtype=torch.float32, device=y.device) for _ in range(2))
    norm = operand(norm_weight), operand(norm_bias)
    normalize_rows(y, None, None, None, *norm, eps, None, normed, mean, rstd)
    return y, normed, mean, rstd


def stitch_layer_norm_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See ``stitch_backward`` and ``layer_norm_backward`` of :mod:`snkernels.reference`."""
    need_x, need_weight, need_bias, need_A, need_B, need_norm_weight, need_norm_bias = needs
    grad = torch.empty(y.shape, dtype=y.dtype, device=y.device)
    vectors = (bias, need_bias), (norm_weight, need_norm_weight), (norm_bias, need_norm_bias)
    sums = normalize_rows_backward(
        grad_y,
        grad_normed,
        None,
        None,
        None,
        y,
        mean,
        rstd,
        operand(norm_weight),
        grad,
        None,
        [vector.dtype if need and vector is not None else None for vector, need in vectors],
    )
    stitch_needs = need_x, need_weight, False, need_A, need_B
    grads = stitch_backward(grad, x, weight, bias, lora_A, lora_B, scaling, stitch_needs)
    if need_bias and bias is not None:
        # From sums that were never rounded, unlike grad; its place is between those of W and A.
        grads.insert(need_x + need_weight, sums.pop(0))
    return grads + sums
