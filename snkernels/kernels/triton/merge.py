"""W' = W + scaling · B A in the dtype of the tokens: a weight that holds its low-rank part.

One pass over the weights before the products costs less than low-rank intermediates of all rows
beside them. W' is rounded once, and belongs to a call: forward and backward each make their own.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.triton import configs
from snkernels.kernels.triton.groups import (
    LORA_A,
    LORA_B,
    WEIGHT,
    Groups,
    Parameter,
    lacks,
    of_group,
)
from snkernels.kernels.triton.launch import dot_precision, launch
from snkernels.kernels.triton.operands import Operand, at, operand, store_tile
from snkernels.kernels.triton.products import dot


@triton.jit(do_not_specialize=["groups"])
def _merge_kernel(
    w,
    a,
    b,
    p_merged,
    p_table,
    p_scalings,
    scaling,
    groups,
    N,
    K,
    R,
    each,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of w + scaling · b a. With a table, that of each group in turn.

    They are ``each`` values apart, and the table gets their addresses, or 0 where there is no w.
    """
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    tile = pid // groups
    rank = R
    if p_table is not None:
        group = (pid % groups).to(tl.int64)
        identity = lacks(w, group)
        p_merged += group * each
        if tile == 0:
            tl.store(p_table + group, tl.where(identity, 0, p_merged.to(tl.int64)))
        if identity:
            return
        scaling = tl.load(p_scalings + group).to(tl.float32)
        if a is not None:
            rank = tl.where(lacks(a, group), 0, R)
        w = of_group(w, group)
        a = of_group(a, group)
        b = of_group(b, group)
    o_n = (tile // blocks_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = (tile % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n = o_n[:, None] < N
    m_k = o_k[None, :] < K
    merged = tl.load(at(w, o_n, o_k), mask=m_n & m_k, other=0.0).to(tl.float32)
    if a is not None:
        dtype: tl.constexpr = p_merged.dtype.element_ty
        o_r = tl.arange(0, BLOCK_R).to(tl.int64)
        low = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for r in range(0, rank, BLOCK_R):
            m_r = o_r < rank - r
            b_tile = tl.load(at(b, o_n, o_r + r), mask=m_n & m_r[None, :], other=0.0)
            a_tile = tl.load(at(a, o_r + r, o_k), mask=m_r[:, None] & m_k, other=0.0)
            low = dot(low, b_tile.to(dtype), a_tile.to(dtype), PRECISION)
        merged += scaling * low
    store_tile(p_merged, merged, o_n, o_k, N, K)


def merged(
    x: Tensor, weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float
) -> Tensor:
    """W', (N, K) in the dtype of x; without a low-rank part W, as it is if it has that dtype."""
    if lora_A is None:
        return weight.to(x.dtype)
    whole = torch.empty(weight.shape, dtype=x.dtype, device=x.device)
    factors = operand(weight), operand(lora_A), operand(lora_B)
    sizes = *weight.shape, lora_A.shape[0]
    _launch(factors, sizes, whole, scaling)
    return whole


def merged_of_groups(groups: Groups, x: Tensor, transposed: bool = False) -> Parameter | None:
    """W' of each group for a kernel, or its transpose; None where all are the identity.

    Those of a call are in one buffer, of which a kernel finds the addresses that this one writes:
    so the host need not tell them, and a graph can be captured.
    """
    one = groups.one(WEIGHT)
    if one is None or (groups.rank == 0 and one.dtype == x.dtype):
        return groups.parameter(WEIGHT, transposed)
    each = -(-one.numel() // 16) * 16  # whole 16 bytes, as kernels take the addresses to be
    whole = torch.empty((groups.count, each), dtype=x.dtype, device=x.device)
    table = torch.empty(groups.count, dtype=torch.int64, device=x.device)
    factors = tuple(groups.parameter(role) for role in (WEIGHT, LORA_A, LORA_B))
    sizes = *one.shape, groups.rank
    _launch(factors, sizes, whole, 1.0, groups, table)
    first = operand(whole[0, : one.numel()].view(one.shape), transposed)
    assert first is not None
    return Parameter(first, table)


def _launch(
    factors: tuple[Operand | Parameter | None, ...],
    sizes: tuple[int, ...],
    whole: Tensor,
    scaling: float,
    groups: Groups | None = None,
    table: Tensor | None = None,
) -> None:
    """``factors``: W, A and B; ``sizes``: N, K and the rank."""
    rows, columns, rank = sizes
    precision = dot_precision(whole.dtype)
    config = configs.merge(whole.dtype, precision, rank)
    tiles = triton.cdiv(rows, config["BLOCK_N"]) * triton.cdiv(columns, config["BLOCK_K"])
    count = 1 if groups is None else groups.count
    launch(
        _merge_kernel,
        (tiles * count,),
        *factors,
        whole,
        table,
        None if groups is None else groups.scalings,
        scaling,
        count,
        *sizes,
        whole.stride(0),
        PRECISION=precision,
        **config,
    )
