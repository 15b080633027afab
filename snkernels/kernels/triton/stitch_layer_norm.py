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
from snkernels.kernels.triton.products import project_tiles
from snkernels.kernels.triton.stitch import low_rank, project, stitch_backward
from snkernels.kernels.triton.sums import sum_rows


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
        normed = _affine(normed, p_gamma, p_beta, columns, N, stride_gamma, stride_beta)
        mask = m_m & (columns[None, :] < N)
        tl.store(p_normed + columns[None, :], normed.to(dtype), mask=mask)


@triton.jit
def _affine(normed, p_gamma, p_beta, o_n, N, stride_gamma, stride_beta):
    if p_gamma is not None:
        normed *= tl.load(p_gamma + o_n * stride_gamma, mask=o_n < N).to(tl.float32)[None, :]
    if p_beta is not None:
        normed += tl.load(p_beta + o_n * stride_beta, mask=o_n < N).to(tl.float32)[None, :]
    return normed


@triton.jit(do_not_specialize=["M"])
def _layer_norm_kernel(
    p_y,
    p_gamma,
    p_beta,
    p_normed,
    p_mean,
    p_rstd,
    M,
    N,
    eps,
    stride_gamma,
    stride_beta,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """LN(y) and its statistics, BLOCK_M whole rows in registers."""
    o_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_n = o_n < N
    mask = (o_m[:, None] < M) & m_n[None, :]
    tile = o_m[:, None] * N + o_n[None, :]
    y = tl.load(p_y + tile, mask=mask, other=0.0).to(tl.float32)
    mean = tl.sum(y, 1) / N
    centred = tl.where(m_n[None, :], y - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    normed = centred * rstd[:, None]
    normed = _affine(normed, p_gamma, p_beta, o_n, N, stride_gamma, stride_beta)
    tl.store(p_normed + tile, normed.to(p_normed.dtype.element_ty), mask=mask)
    tl.store(p_mean + o_m, mean, mask=o_m < M)
    tl.store(p_rstd + o_m, rstd, mask=o_m < M)


@triton.jit(do_not_specialize=["M", "chunk"])
def _layer_norm_backward_kernel(
    p_grad_normed,
    p_grad_y,
    p_y,
    p_mean,
    p_rstd,
    p_gamma,
    p_grad,
    p_partial,
    M,
    N,
    chunk,
    stride_nm,
    stride_nn,
    stride_ym,
    stride_yn,
    stride_gamma,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The whole gradient of y in one chunk of rows, and what the chunk adds to other gradients.

    ``partial`` is (chunks, 3, N): the sums for norm weight, norm bias and bias, in this order.
    """
    pid = tl.program_id(0).to(tl.int64)
    o_m = pid * chunk + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_n = o_n < N
    end = tl.minimum((pid + 1) * chunk, M)
    gamma = tl.full([BLOCK_N], 1.0, tl.float32)
    if p_gamma is not None:
        gamma = tl.load(p_gamma + o_n * stride_gamma, mask=m_n, other=0.0).to(tl.float32)
    grad_gamma = tl.zeros([BLOCK_N], tl.float32)
    grad_beta = tl.zeros([BLOCK_N], tl.float32)
    grad_bias = tl.zeros([BLOCK_N], tl.float32)
    for m in range(0, chunk, BLOCK_M):
        rows = o_m + m
        mask = (rows[:, None] < end) & m_n[None, :]
        tile = rows[:, None] * N + o_n[None, :]
        mean = tl.load(p_mean + rows, mask=rows < end, other=0.0)[:, None]
        rstd = tl.load(p_rstd + rows, mask=rows < end, other=0.0)[:, None]
        p_rows = p_grad_normed + rows[:, None] * stride_nm + o_n[None, :] * stride_nn
        grad_normed = tl.load(p_rows, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(p_y + tile, mask=mask, other=0.0).to(tl.float32)
        normalized = tl.where(mask, (y - mean) * rstd, 0.0)
        weighted = grad_normed * gamma[None, :]
        along_mean = tl.sum(weighted, 1, keep_dims=True) / N
        along_normalized = tl.sum(weighted * normalized, 1, keep_dims=True) / N
        grad = rstd * (weighted - along_mean - normalized * along_normalized)
        if p_grad_y is not None:
            p_rows = p_grad_y + rows[:, None] * stride_ym + o_n[None, :] * stride_yn
            grad += tl.load(p_rows, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_grad + tile, grad.to(p_grad.dtype.element_ty), mask=mask)
        grad_gamma += tl.sum(grad_normed * normalized, 0)
        grad_beta += tl.sum(grad_normed, 0)
        grad_bias += tl.sum(tl.where(mask, grad, 0.0), 0)
    tl.store(p_partial + pid * 3 * N + o_n, grad_gamma, mask=m_n)
    tl.store(p_partial + (pid * 3 + 1) * N + o_n, grad_beta, mask=m_n)
    tl.store(p_partial + (pid * 3 + 2) * N + o_n, grad_bias, mask=m_n)


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
        config = configs.layer_norm(features)
        launch(
            _layer_norm_kernel,
            (triton.cdiv(rows, config["BLOCK_M"]),),
            y,
            norm_weight,
            norm_bias,
            normed,
            mean,
            rstd,
            rows,
            features,
            eps,
            *strides(norm_weight, 1),
            *strides(norm_bias, 1),
            **config,
        )
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
    rows, features = y.shape
    config = configs.layer_norm(features)
    chunks = max(1, min(512, rows // config["BLOCK_M"]))
    grad = torch.empty((rows, features), dtype=y.dtype, device=y.device)
    partial = torch.empty((chunks, 3, features), dtype=torch.float32, device=y.device)
    launch(
        _layer_norm_backward_kernel,
        (chunks,),
        grad_normed,
        grad_y,
        y,
        mean,
        rstd,
        norm_weight,
        grad,
        partial,
        rows,
        features,
        triton.cdiv(rows, chunks),
        *grad_normed.stride(),
        *strides(grad_y, 2),
        *strides(norm_weight, 1),
        **config,
    )
    # One launch brings the chunks of all three sums down to a few; each is then summed by itself.
    partial = sum_rows(partial.view(chunks, 3 * features), 16, torch.float32).view(-1, 3, features)

    def summed(position: int, like: Tensor) -> Tensor:
        return sum_rows(partial[:, position], 1, like.dtype).view(features)

    need_x, need_weight, need_bias, need_A, need_B, need_norm_weight, need_norm_bias = needs
    stitch_needs = need_x, need_weight, False, need_A, need_B
    grads = stitch_backward(grad, x, weight, bias, lora_A, lora_B, scaling, stitch_needs)
    if need_bias and bias is not None:
        # From sums that were never rounded, unlike grad; its place is between those of W and A.
        grads.insert(need_x + need_weight, summed(2, bias))
    if need_norm_weight and norm_weight is not None:
        grads.append(summed(0, norm_weight))
    if need_norm_bias and norm_bias is not None:
        grads.append(summed(1, norm_bias))
    return grads
