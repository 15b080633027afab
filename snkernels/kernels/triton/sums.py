"""Sums over rows in a fixed order: sums of chunks, then their sum; no atomics."""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.triton import configs
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


@triton.jit(do_not_specialize=["M", "chunk"])
def _sum_rows_kernel(
    matrix,
    p_out,
    M,
    N,
    chunk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[i] = the sum over the i-th chunk of rows."""
    pid = tl.program_id(1).to(tl.int64)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.minimum((pid + 1) * chunk, M)
    total = sum_of_rows(matrix, o_n, pid * chunk, end, N, BLOCK_M)
    tl.store(p_out + pid * N + o_n, total.to(p_out.dtype.element_ty), mask=o_n < N)


def sum_rows(matrix: Tensor, chunks: int, dtype: torch.dtype) -> Tensor:
    """The fp32 sums of ``chunks`` chunks of the rows of an (M, N) matrix, (chunks, N) in dtype."""
    rows, width = matrix.shape
    sums = torch.empty((chunks, width), dtype=dtype, device=matrix.device)
    config = configs.sum_rows()
    launch(
        _sum_rows_kernel,
        (triton.cdiv(width, config["BLOCK_N"]), chunks),
        operand(matrix),
        sums,
        rows,
        width,
        triton.cdiv(rows, chunks),
        **config,
    )
    return sums


def column_sums(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """The fp32 sum over all rows of an (M, N) matrix, (N,) in ``dtype``."""
    rows, width = matrix.shape
    chunks = max(1, min(128, rows // 32))
    return sum_rows(sum_rows(matrix, chunks, torch.float32), 1, dtype).view(width)


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
