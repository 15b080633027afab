"""``stitch_layer_norm`` in Triton: y, LN(y) and the statistics, and all gradients.

LN(y) is that of the y which is returned, rounded to its dtype, so that the backward, which has
only that y, belongs to exactly this function. Narrow rows stay in registers from the first product
to LN(y) (``_row_kernel``). A wide row does not fit one CTA: there y is projected tile by tile,
and a second pass finds it in L2.

Compiled and interpreted, never run on a GPU yet.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.native import norm_outputs
from snkernels.kernels.triton import configs
from snkernels.kernels.triton.launch import dot_precision, launch, strides
from snkernels.kernels.triton.norms import affine
from snkernels.kernels.triton.products import project_tiles
from snkernels.kernels.triton.residual_layer_norm import normalize_rows, normalize_rows_backward
from snkernels.kernels.triton.stitch import like, low_rank, project, stitch_backward


@triton.jit(do_not_specialize=["M"])
def _row_kernel(
    p_x,
    p_w,
    p_bias,
    p_low,
    p_b,
    p_gamma,
    p_beta,
    p_y,
    p_normed,
    p_mean,
    p_rstd,
    M,
    N,
    K,
    R,
    eps,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_bn,
    stride_br,
    stride_gamma,
    stride_beta,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
):
    """Whole rows of y and LN(y), held as TILES tiles of columns."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    tiles = project_tiles(
        p_x,
        p_w,
        p_bias,
        p_low,
        p_b,
        o_m,
        o_n,
        M,
        N,
        K,
        R,
        stride_xm,
        stride_xk,
        stride_wn,
        stride_wk,
        stride_bias,
        R,
        stride_bn,
        stride_br,
        PRECISION,
        BLOCK_K,
        BLOCK_R,
        TILES,
    )
    store_rows(
        tiles,
        p_y,
        p_normed,
        p_mean,
        p_rstd,
        p_gamma,
        p_beta,
        o_m,
        o_n,
        M,
        N,
        eps,
        stride_gamma,
        stride_beta,
        TILES,
    )


@triton.jit
def store_rows(
    tiles,
    p_y,
    p_normed,
    p_mean,
    p_rstd,
    p_gamma,
    p_beta,
    o_m,
    o_n,
    M,
    N,
    eps,
    stride_gamma,
    stride_beta,
    TILES: tl.constexpr,
):
    """Stores whole rows of y, held as tiles, of LN(y) and of its statistics."""
    BLOCK_N: tl.constexpr = o_n.shape[0]
    dtype = p_y.dtype.element_ty
    m_m = o_m[:, None] < M
    p_y += o_m[:, None] * N
    p_normed += o_m[:, None] * N
    y = ()
    total = tl.zeros([o_m.shape[0]], tl.float32)
    for i in tl.static_range(TILES):
        columns = o_n + i * BLOCK_N
        y += (tiles[i].to(dtype),)
        # Columns past the last hold zeros: weight and bias are zero there.
        total += tl.sum(y[i].to(tl.float32), 1)
        tl.store(p_y + columns[None, :], y[i], mask=m_m & (columns[None, :] < N))
    mean = total / N
    squares = tl.zeros([o_m.shape[0]], tl.float32)
    for i in tl.static_range(TILES):
        centred = y[i].to(tl.float32) - mean[:, None]
        squares += tl.sum(tl.where(o_n[None, :] + i * BLOCK_N < N, centred * centred, 0.0), 1)
    rstd = tl.rsqrt(squares / N + eps)
    tl.store(p_mean + o_m, mean, mask=o_m < M)
    tl.store(p_rstd + o_m, rstd, mask=o_m < M)
    for i in tl.static_range(TILES):
        columns = o_n + i * BLOCK_N
        normed = (y[i].to(tl.float32) - mean[:, None]) * rstd[:, None]
        normed = affine(normed, p_gamma, p_beta, columns, N, stride_gamma, stride_beta)
        mask = m_m & (columns[None, :] < N)
        tl.store(p_normed + columns[None, :], normed.to(dtype), mask=mask)


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
        config = configs.row(features)
        launch(
            _row_kernel,
            (triton.cdiv(rows, config["BLOCK_M"]),),
            x,
            weight,
            bias,
            low,
            lora_B,
            norm_weight,
            norm_bias,
            y,
            normed,
            mean,
            rstd,
            rows,
            features,
            in_features,
            0 if low is None else low.shape[1],
            eps,
            *x.stride(),
            *weight.stride(),
            *strides(bias, 1),
            *strides(lora_B, 2),
            *strides(norm_weight, 1),
            *strides(norm_bias, 1),
            PRECISION=dot_precision(x.dtype),
            **config,
        )
    else:
        project(x, weight, y, bias, low, lora_B)
        normalize_rows(y, None, None, None, norm_weight, norm_bias, eps, None, normed, mean, rstd)
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
        norm_weight,
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
