"""W' = W + scaling · B A of groups in the dtype of the tokens: it holds the low-rank part.

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
from snkernels.kernels.triton.operands import at, operand, store_tile
from snkernels.kernels.triton.products import dot


@triton.jit(do_not_specialize=["groups"])
def _merge_kernel(
    w,
    a,
    b,
    p_merged,
    p_table,
    p_scalings,
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
    """One tile of w + scaling · b a, of each group in turn.

    They are ``each`` values apart, and the table gets their addresses, or 0 where there is no w.
    """
    blocks_k = tl.cdiv(K, BLOCK_K)
    pid = tl.program_id(0)
    tile = pid // groups
    group = (pid % groups).to(tl.int64)
    identity = lacks(w, group)
    p_merged += group * each
    if tile == 0:
        tl.store(p_table + group, tl.where(identity, 0, p_merged.to(tl.int64)))
    if identity:
        return
    o_n = (tile // blocks_k).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = (tile % blocks_k).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_n = o_n[:, None] < N
    m_k = o_k[None, :] < K
    merged = tl.load(at(of_group(w, group), o_n, o_k), mask=m_n & m_k, other=0.0).to(tl.float32)
    if a is not None:
        rank = tl.where(lacks(a, group), 0, R)
        a = of_group(a, group)
        b = of_group(b, group)
        dtype: tl.constexpr = p_merged.dtype.element_ty
        o_r = tl.arange(0, BLOCK_R).to(tl.int64)
        low = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
        for r in range(0, rank, BLOCK_R):
            m_r = o_r < rank - r
            b_tile = tl.load(at(b, o_n, o_r + r), mask=m_n & m_r[None, :], other=0.0)
            a_tile = tl.load(at(a, o_r + r, o_k), mask=m_r[:, None] & m_k, other=0.0)
            low = dot(low, b_tile.to(dtype), a_tile.to(dtype), PRECISION)
        merged += tl.load(p_scalings + group).to(tl.float32) * low
    store_tile(p_merged, merged, o_n, o_k, N, K)


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
    (rows, columns), precision = one.shape, dot_precision(x.dtype)
    config = configs.merge(x.dtype, precision, groups.rank)
    tiles = triton.cdiv(rows, config["BLOCK_N"]) * triton.cdiv(columns, config["BLOCK_K"])
    launch(
        _merge_kernel,
        (tiles * groups.count,),
        *(groups.parameter(role) for role in (WEIGHT, LORA_A, LORA_B)),
        whole,
        table,
        groups.scalings,
        groups.count,
        rows,
        columns,
        groups.rank,
        each,
        PRECISION=precision,
        **config,
    )
    first = operand(whole[0, : one.numel()].view(one.shape), transposed)
    assert first is not None
    return Parameter(first, table)
