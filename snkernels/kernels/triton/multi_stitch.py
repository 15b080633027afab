"""``multi_stitch`` and ``multi_stitch_layer_norm`` in Triton: a stitch for each group of rows.

A program finds its work and its parameters in tables (see ``groups``). LayerNorm is that of the
ops without groups, told of them. The backward is next door, in ``multi_stitch_backward``.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.native import norm_outputs
from snkernels.kernels.triton import configs
from snkernels.kernels.triton.groups import (
    BIAS,
    LORA_A,
    NORM_BIAS,
    NORM_WEIGHT,
    Groups,
    Parameter,
    find,
    lacks,
    of_group,
)
from snkernels.kernels.triton.launch import dot_precision, launch
from snkernels.kernels.triton.merge import merged_of_groups
from snkernels.kernels.triton.norms import columns
from snkernels.kernels.triton.operands import at, operand, store_tile
from snkernels.kernels.triton.products import dot
from snkernels.kernels.triton.residual_layer_norm import normalize_rows


@triton.jit
def _products(
    x,
    w,
    o_m,
    o_n,
    M,
    N,
    K,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Rows ``o_m`` and columns ``o_n`` of x w, (M, K) by (K, N), as products in the dtype of x."""
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    m_m = o_m[:, None] < M
    m_n = o_n[None, :] < N
    p_x = at(x, o_m, o_k)
    p_w = at(w, o_k, o_n)
    step_x = tl.cast(x.strides[1], tl.int64) * BLOCK_K
    step_w = tl.cast(w.strides[0], tl.int64) * BLOCK_K
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = o_k < K - k
        x_tile = tl.load(p_x, mask=m_m & m_k[None, :], other=0.0)
        w_tile = tl.load(p_w, mask=m_k[:, None] & m_n, other=0.0)
        y = dot(y, x_tile, w_tile.to(x_tile.dtype), PRECISION)
        p_x += step_x
        p_w += step_w
    return y


@triton.jit(do_not_specialize=["M", "groups"])
def _project_groups_kernel(
    x,
    w,
    bias,
    p_y,
    p_offsets,
    p_scalings,
    M,
    groups,
    N,
    K,
    NARROW: tl.constexpr,
    IDENTITY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One tile of y = x w + bias. IDENTITY: or of x itself where a group has no w.

    NARROW: of y = scaling · x w instead, or of zeros.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    # Tiles of the same rows run side by side, so that x comes from L2 all but once.
    pid = tl.program_id(0)
    group, row, end = find(p_offsets, groups, M, pid // blocks_n, BLOCK_M)
    if row >= end:
        return
    o_m = row + tl.arange(0, BLOCK_M)
    o_n = (pid % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if IDENTITY and lacks(w, group):
        mask = (o_m[:, None] < end) & (o_n[None, :] < N)
        y = tl.load(at(x, o_m, o_n), mask=mask, other=0.0).to(tl.float32)
    else:
        # By a name of its own: a size of 1 is a constant, which a branch cannot make a tensor.
        terms = K
        if NARROW:
            terms = tl.where(lacks(w, group), 0, K)
        y = _products(
            x, of_group(w, group), o_m, o_n, end, N, terms, PRECISION, BLOCK_M, BLOCK_N, BLOCK_K
        )
        y += columns(of_group(bias, group), o_n, N, 0.0)
        if NARROW:
            y *= tl.load(p_scalings + group).to(tl.float32)
    store_tile(p_y, y, o_m, o_n, end, N)


def project(
    groups: Groups,
    x: Tensor,
    y: Tensor,
    w: Parameter | None,
    *,
    bias: Parameter | None = None,
    narrow: bool = False,
) -> Tensor:
    """Fills y with x w + bias, and returns it; with scaling · x w if ``narrow``.

    Of a group without w it gets x, or zeros if ``narrow``.
    """
    if w is None:  # all groups are the identity
        return y.copy_(x)
    features = y.shape[1]
    precision = dot_precision(x.dtype)
    config = configs.project(x.dtype, w.one.data.dtype, precision, features)
    launch(
        _project_groups_kernel,
        (groups.tiles(config["BLOCK_M"]) * triton.cdiv(features, config["BLOCK_N"]),),
        operand(x),
        w,
        bias,
        y,
        groups.offsets,
        groups.scalings,
        x.shape[0],
        groups.count,
        features,
        x.shape[1],
        NARROW=narrow,
        IDENTITY=not narrow and groups.has_identity,
        PRECISION=precision,
        **config,
    )
    return y


def low_rank(groups: Groups, x: Tensor, role: int = LORA_A) -> Tensor:
    """S = scaling · x Aᵀ, or scaling · x B of B: (M, largest rank) in fp32."""
    low = torch.empty((x.shape[0], groups.rank), dtype=torch.float32, device=x.device)
    return project(groups, x, low, groups.parameter(role, role == LORA_A), narrow=True)


def multi_stitch_forward(
    x: Tensor,
    group_offsets: Tensor | list[int],
    tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    out_features: int,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, LN(y), mean, 1/σ), the last three empty without ``normalize``."""
    y, normed, mean, rstd = norm_outputs(x, out_features, normalize=normalize)
    if y.numel() == 0:
        return y, normed, mean, rstd
    groups = Groups(x, group_offsets, tensors, scalings, out_features)
    w = merged_of_groups(groups, x, transposed=True)
    project(groups, x, y, w, bias=groups.parameter(BIAS))
    if normalize:
        norm = groups.parameter(NORM_WEIGHT), groups.parameter(NORM_BIAS)
        normalize_rows(y, None, None, None, *norm, eps, None, normed, mean, rstd, groups)
    return y, normed, mean, rstd
