"""``stitch`` in Triton: y = x W'ᵀ + b with W' = W + s · B A, and its gradients.

Two kernels do it all, beside the one that merges W'. The projection gives y, dx = dy W' by other
strides, and for dB and dA the low-rank intermediates S = s · x Aᵀ and T = s · dy B, in fp32. The
outer product over rows gives dW = dyᵀ x, dB = dyᵀ S and dAᵀ = xᵀ T, in chunks of rows that are
summed in a fixed order.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.triton import configs
from snkernels.kernels.triton.groups import Groups, in_chunks, rows_of
from snkernels.kernels.triton.launch import dot_precision, launch
from snkernels.kernels.triton.merge import merged
from snkernels.kernels.triton.operands import Operand, at, operand, store_tile
from snkernels.kernels.triton.products import dot, dot_wide, factors, project_tile
from snkernels.kernels.triton.sums import column_sums, sum_chunks


@triton.jit(do_not_specialize=["M"])
def _project_kernel(
    x,
    w,
    bias,
    p_y,
    M,
    N,
    K,
    scaling,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr,
    TRANSPOSED: tl.constexpr,
):
    """One tile of y = scaling · (x w + bias)."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    # Tiles of the same rows run side by side, so that x comes from L2 all but once.
    pid = tl.program_id(0)
    row = (pid // blocks_n).to(tl.int64) * BLOCK_M
    column = (pid % blocks_n).to(tl.int64) * BLOCK_N
    y = project_tile(
        *(x, w, bias, row, column, M, N, K),
        *(PRECISION, BLOCK_M, BLOCK_N, BLOCK_K, TMA, TRANSPOSED),
    )
    o_m = row + tl.arange(0, BLOCK_M)
    o_n = column + tl.arange(0, BLOCK_N)
    store_tile(p_y, y * scaling, o_m, o_n, M, N)


@triton.jit(do_not_specialize=["M", "chunk", "groups"])
def _outer_kernel(
    left,
    right,
    p_out,
    M,
    P,
    Q,
    chunk,
    strides_out,
    p_offsets,
    groups,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """One tile of out[i] = leftᵀ right over the i-th chunk of rows, in the dtype of left."""
    chunk_id = tl.program_id(1).to(tl.int64)
    _, start, end = rows_of(p_offsets, groups, M, chunk_id, chunk)
    if p_offsets is not None and start >= end:
        return
    end = tl.minimum(start + chunk, end)
    blocks_q = tl.cdiv(Q, BLOCK_Q)
    pid = tl.program_id(0)
    o_m = start + tl.arange(0, BLOCK_M)
    o_p = (pid // blocks_q).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_q = (pid % blocks_q).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_p = o_p < P
    m_q = o_q < Q
    p_left = at(Operand(left.data, (left.strides[1], left.strides[0])), o_p, o_m)
    p_right = at(right, o_m, o_q)
    step_left = tl.cast(left.strides[0], tl.int64) * BLOCK_M
    step_right = tl.cast(right.strides[0], tl.int64) * BLOCK_M

    acc = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32)
    for m in range(0, (end - start).to(tl.int32), BLOCK_M):
        m_m = o_m < end - m
        left_tile = tl.load(p_left, mask=m_p[:, None] & m_m[None, :], other=0.0)
        right_tile = tl.load(p_right, mask=m_m[:, None] & m_q[None, :], other=0.0)
        if right_tile.dtype == tl.float32:
            acc = dot_wide(acc, left_tile, right_tile, PRECISION)
        else:
            acc = dot(acc, left_tile, right_tile.to(left_tile.dtype), PRECISION)
        p_left += step_left
        p_right += step_right
    out = Operand(p_out + chunk_id * P * Q, strides_out)
    tl.store(at(out, o_p, o_q), acc, mask=m_p[:, None] & m_q[None, :])


def project(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    bias: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Fills y, (M, N), with scaling · (x weightᵀ + bias), and returns it.

    Products are in the dtype of x, sums in fp32.
    """
    (rows, in_features), out_features = x.shape, weight.shape[0]
    precision = dot_precision(x.dtype)
    config = configs.project(x.dtype, weight.dtype, precision, out_features)
    tiles = triton.cdiv(rows, config["BLOCK_M"]) * triton.cdiv(out_features, config["BLOCK_N"])
    by_x, by_w, options = factors(x, weight, config)
    launch(
        _project_kernel,
        (tiles,),
        by_x,
        by_w,
        operand(bias),
        y,
        rows,
        out_features,
        in_features,
        scaling,
        PRECISION=precision,
        **options,
    )
    return y


def low_rank(x: Tensor, lora_A: Tensor, scaling: float) -> Tensor:
    """S = scaling · x Aᵀ, (M, r) in fp32."""
    low = torch.empty((x.shape[0], lora_A.shape[0]), dtype=torch.float32, device=x.device)
    return project(x, lora_A, low, scaling=scaling)


def outer(
    left: Tensor,
    right: Tensor,
    dtype: torch.dtype,
    transposed: bool = False,
    groups: Groups | None = None,
) -> Tensor:
    """leftᵀ right of (M, P) and (M, Q): (P, Q) in ``dtype``, or (Q, P) if transposed.

    With groups that of each one's rows, (groups, P, Q) or (groups, Q, P).
    """
    (rows, height), width = left.shape, right.shape[1]
    shape = (width, height) if transposed else (height, width)
    precision = dot_precision(left.dtype)
    config = configs.outer(left.dtype, precision, width)
    tiles = triton.cdiv(height, config["BLOCK_P"]) * triton.cdiv(width, config["BLOCK_Q"])
    most = max(1, min(256 // max(1, tiles), rows // (2 * config["BLOCK_M"])))
    chunk = triton.cdiv(rows, most)
    chunks, *found_by = in_chunks(rows, chunk, groups)
    partial = torch.empty((chunks, height * width), dtype=torch.float32, device=left.device)
    launch(
        _outer_kernel,
        (tiles, chunks),
        operand(left),
        operand(right),
        partial,
        rows,
        height,
        width,
        chunk,
        (1, height) if transposed else (width, 1),
        *found_by,
        PRECISION=precision,
        **config,
    )
    return sum_chunks(partial, chunk, dtype, groups).unflatten(-1, shape)


def stitch_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> Tensor:
    """See :func:`snkernels.reference.stitch`."""
    y = torch.empty((x.shape[0], weight.shape[0]), dtype=x.dtype, device=x.device)
    return project(x, merged(x, weight, lora_A, lora_B, scaling), y, bias)


def stitch_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See :func:`snkernels.reference.stitch_backward`."""
    need_x, need_weight, need_bias, need_A, need_B = needs
    grads = []
    if need_x:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        by_rows = merged(grad_y, weight, lora_A, lora_B, scaling).t()
        grads.append(project(grad_y, by_rows, grad_x))
    if need_weight:
        grads.append(outer(grad_y, x, weight.dtype))
    if need_bias and bias is not None:
        grads.append(column_sums(grad_y, bias.dtype))
    if need_A and lora_A is not None and lora_B is not None:
        low_grad = low_rank(grad_y, lora_B.t(), scaling)
        grads.append(outer(x, low_grad, lora_A.dtype, transposed=True))
    if need_B and lora_A is not None and lora_B is not None:
        grads.append(outer(grad_y, low_rank(x, lora_A, scaling), lora_B.dtype))
    return grads
