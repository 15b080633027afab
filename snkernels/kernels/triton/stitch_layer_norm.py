"""``stitch_layer_norm`` in Triton: y, LN(y) and the statistics, and all gradients.

LN(y) is that of the y which is returned, rounded to its dtype, so that the backward, which has
only that y, belongs to exactly this function. Narrow rows stay in registers from the first product
to LN(y) (``_row_kernel``). A wide row does not fit one CTA: there y is projected tile by tile,
and a second pass finds it in L2.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.native import norm_outputs
from snkernels.kernels.triton import configs
from snkernels.kernels.triton.launch import dot_precision, launch
from snkernels.kernels.triton.norms import store_rows
from snkernels.kernels.triton.operands import operand
from snkernels.kernels.triton.products import factors, project_tiles
from snkernels.kernels.triton.residual_layer_norm import normalize_rows, normalize_rows_backward
from snkernels.kernels.triton.stitch import like, low_rank, project, stitch_backward


@triton.jit(do_not_specialize=["M"])
def _row_kernel(
    x,
    w,
    bias,
    low,
    b,
    gamma,
    beta,
    p_y,
    p_normed,
    p_mean,
    p_rstd,
    M,
    N,
    K,
    R,
    eps,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
    TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """Whole rows of y and LN(y), held as TILES tiles of columns."""
    row = tl.program_id(0).to(tl.int64) * BLOCK_M
    tiles = project_tiles(
        *(x, w, bias, low, b, row, tl.cast(0, tl.int64), M, N, K, R),
        *(PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, BLOCK_R, TILES, TMA, TRANSPOSED),
    )
    outputs = p_y, p_normed, p_mean, p_rstd
    store_rows(tiles, *outputs, gamma, beta, row, M, N, eps, BLOCK_M, BLOCK_N, TILES)


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
    (rows, in_features), features = x.shape, weight.shape[0]
    y, normed, mean, rstd = norm_outputs(x, features)
    weight = like(x, weight)
    low = low_rank(x, lora_A, scaling)
    if configs.rows_fit(x.dtype, features):
        config = configs.row(weight.dtype, features)
        by_x, by_w, options = factors(x, weight, config)
        launch(
            _row_kernel,
            (triton.cdiv(rows, config["BLOCK_M"]),),
            by_x,
            by_w,
            operand(bias),
            operand(low),
            operand(lora_B, transposed=True),
            operand(norm_weight),
            operand(norm_bias),
            y,
            normed,
            mean,
            rstd,
            rows,
            features,
            in_features,
            0 if low is None else low.shape[1],
            eps,
            PRECISION=dot_precision(x.dtype),
            **options,
        )
    else:
        project(x, weight, y, bias, low, lora_B)
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
