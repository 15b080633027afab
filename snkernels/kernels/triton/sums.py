"""Sums over rows in a fixed order: sums of chunks, then their sum; no atomics."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.triton import configs
from snkernels.kernels.triton.groups import Groups, bounds, find
from snkernels.kernels.triton.launch import launch
from snkernels.kernels.triton.operands import at, operand


@triton.jit
def sum_of_rows(matrix, o_n, start, end, N, BLOCK_M: tl.constexpr):
    """The fp32 sums of columns ``o_n`` over rows ``start`` to ``end``, both int64."""
    o_m = start + tl.arange(0, BLOCK_M)
    p_rows = at(matrix, o_m, o_n)
    step = tl.cast(matrix.strides[0], tl.int64) * BLOCK_M
    acc = tl.zeros([BLOCK_M, o_n.shape[0]], tl.float32)
    for m in range(0, (end - start).to(tl.int32), BLOCK_M):
        mask = (o_m[:, None] + m < end) & (o_n[None, :] < N)
        acc += tl.load(p_rows, mask=mask, other=0.0).to(tl.float32)
        p_rows += step
    return tl.sum(acc, 0)


@triton.jit(do_not_specialize=["M", "chunk", "groups"])
def _sum_rows_kernel(
    matrix,
    p_out,
    M,
    N,
    chunk,
    p_offsets,
    groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[i] = the fp32 sum over the i-th chunk of rows."""
    pid = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    _, start, end = find(p_offsets, groups, M, pid, chunk)
    if start >= end:
        return
    end = tl.minimum(start + chunk, end)
    total = sum_of_rows(matrix, o_n, start, end, N, BLOCK_M)
    tl.store(p_out + pid * N + o_n, total, mask=o_n < N)


@triton.jit(do_not_specialize=["M", "chunk"])
def _sum_groups_kernel(
    partial,
    p_out,
    p_offsets,
    M,
    N,
    chunk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[g] = the sum over the chunks of group g."""
    group = tl.program_id(1).to(tl.int64)
    start, end = bounds(p_offsets, group, tl.cast(M, tl.int64))
    first = start // chunk + group
    chunks = tl.cdiv(tl.maximum(end - start, 0), chunk)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = sum_of_rows(partial, o_n, first, first + chunks, N, BLOCK_M)
    tl.store(p_out + group * N + o_n, total.to(p_out.dtype.element_ty), mask=o_n < N)


def sum_chunks(partial: Tensor, chunk: int, dtype: torch.dtype, groups: Groups) -> Tensor:
    """The sums of what the chunks of ``chunk`` rows add, (chunks, N): (groups, N) in ``dtype``."""
    width = partial.shape[1]
    sums = torch.empty((groups.count, width), dtype=dtype, device=partial.device)
    config = configs.sum_rows()
    launch(
        _sum_groups_kernel,
        (triton.cdiv(width, config["BLOCK_N"]), groups.count),
        operand(partial),
        sums,
        groups.offsets,
        groups.rows,
        width,
        chunk,
        **config,
    )
    return sums


def column_sums(matrix: Tensor, dtype: torch.dtype, groups: Groups) -> Tensor:
    """The fp32 sums over each group's rows of an (M, N) matrix: (groups, N) in ``dtype``."""
    rows, width = matrix.shape
    chunk = triton.cdiv(rows, max(1, min(128, rows // 32)))
    chunks = groups.tiles(chunk)
    # That of a chunk without rows is not written, and nobody looks at it.
    partial = torch.empty((chunks, width), dtype=torch.float32, device=matrix.device)
    config = configs.sum_rows()
    launch(
        _sum_rows_kernel,
        (triton.cdiv(width, config["BLOCK_N"]), chunks),
        operand(matrix),
        partial,
        rows,
        width,
        chunk,
        groups.offsets,
        groups.count,
        **config,
    )
    return sum_chunks(partial, chunk, dtype, groups)


@triton.jit(do_not_specialize=["CHUNKS"])
def _sum_partials_kernel(
    p_partial,
    p_first,
    p_second,
    p_third,
    CHUNKS,
    N,
    stride_chunk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The sums over the chunks of one column of partials, each written to an output of its own."""
    which = tl.program_id(1).to(tl.int64)
    o_m = tl.arange(0, BLOCK_M).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    m_n = o_n < N
    p_partial += o_m[:, None] * stride_chunk + (which * N + o_n)[None, :]
    step = tl.cast(stride_chunk, tl.int64) * BLOCK_M
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m in range(0, CHUNKS, BLOCK_M):
        acc += tl.load(p_partial, mask=(o_m[:, None] + m < CHUNKS) & m_n[None, :], other=0.0)
        p_partial += step
    total = tl.sum(acc, 0)
    _store_if(which == 0, p_first, o_n, total, N)
    _store_if(which == 1, p_second, o_n, total, N)
    _store_if(which == 2, p_third, o_n, total, N)


@triton.jit
def _store_if(condition, p_out, o_n, values, N):
    if p_out is not None:
        mask = o_n < tl.where(condition, N, 0)
        tl.store(p_out + o_n, values.to(p_out.dtype.element_ty), mask=mask)


def sum_partials(partial: Tensor, dtypes: Sequence[torch.dtype]) -> list[Tensor]:
    """The sums over chunks of up to three vectors, (chunks, vectors, N) in fp32: (N,) each.

    One launch, however many they are: beside a pass over the rows a launch is not small.
    """
    chunks, vectors, width = partial.shape
    sums = [torch.empty(width, dtype=dtype, device=partial.device) for dtype in dtypes]
    if not sums:
        return sums
    config = configs.sum_partials()
    launch(
        _sum_partials_kernel,
        (triton.cdiv(width, config["BLOCK_N"]), vectors),
        partial,
        *sums,
        *[None] * (3 - vectors),
        chunks,
        width,
        vectors * width,
        **config,
    )
    return sums
