"""The outer product over the rows of each group, in chunks of rows.

It gives all gradients of the weights, of whose low-rank factors one side is an intermediate in fp32
that is never rounded.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.triton import configs
from snkernels.kernels.triton.groups import Groups, find
from snkernels.kernels.triton.launch import dot_precision, launch
from snkernels.kernels.triton.operands import Operand, at, operand
from snkernels.kernels.triton.products import dot, dot_wide
from snkernels.kernels.triton.sums import sum_chunks


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
    _, start, end = find(p_offsets, groups, M, chunk_id, chunk)
    if start >= end:
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


def outer(
    left: Tensor, right: Tensor, dtype: torch.dtype, groups: Groups, transposed: bool = False
) -> Tensor:
    """leftᵀ right over each group's rows of (M, P) and (M, Q): (groups, P, Q) in ``dtype``.

    (groups, Q, P) if transposed.
    """
    (rows, height), width = left.shape, right.shape[1]
    shape = (width, height) if transposed else (height, width)
    precision = dot_precision(left.dtype)
    config = configs.outer(left.dtype, precision, width)
    tiles = triton.cdiv(height, config["BLOCK_P"]) * triton.cdiv(width, config["BLOCK_Q"])
    most = max(1, min(256 // max(1, tiles), rows // (2 * config["BLOCK_M"])))
    chunk = triton.cdiv(rows, most)
    chunks = groups.tiles(chunk)
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
        groups.offsets,
        groups.count,
        PRECISION=precision,
        **config,
    )
    return sum_chunks(partial, chunk, dtype, groups).unflatten(-1, shape)
