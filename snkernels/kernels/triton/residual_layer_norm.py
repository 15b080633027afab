"""``residual_layer_norm`` in Triton: h + γ · s · branch, LN of it, and all gradients.

Each direction is one pass over memory. A program holds whole rows in registers, so the statistics
are two-pass in fp32 and cost no second look at memory; LN is that of the sum which is returned,
rounded to its dtype. Bytes bound both: forward 4 matrices of M · N values go by, backward 6, or 5
where γ needs no gradient and the branch is not read again. ``stitch_layer_norm`` runs the same
kernels on the sum that it has already, its y.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.native import norm_outputs
from snkernels.kernels.triton import configs
from snkernels.kernels.triton.groups import Groups, Parameter, in_chunks, of_group, rows_of
from snkernels.kernels.triton.launch import launch
from snkernels.kernels.triton.norms import affine, columns, normalize, normalize_backward
from snkernels.kernels.triton.operands import Operand, at, operand
from snkernels.kernels.triton.sums import sum_chunks, sum_partials


@triton.jit
def _of_samples(drop_path, o_m, m_m, each):
    """What stochastic depth multiplies rows ``o_m`` by: samples are ``each`` rows long."""
    if drop_path is None:
        return 1.0
    else:
        p_scale = drop_path.data + o_m // each * drop_path.strides[0]
        scale = tl.load(p_scale, mask=m_m, other=0.0)
        return scale.to(tl.float32)[:, None]


@triton.jit(do_not_specialize=["M", "each", "groups"])
def _normalize_kernel(
    h,
    branch,
    layer_scale,
    drop_path,
    gamma,
    beta,
    p_total,
    p_normed,
    p_mean,
    p_rstd,
    M,
    N,
    each,
    eps,
    p_offsets,
    groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """BLOCK_M whole rows of the sum and of LN of it; without a branch the sum is h."""
    pid = tl.program_id(0).to(tl.int64)
    group, row, end = rows_of(p_offsets, groups, M, pid, BLOCK_M)
    if p_offsets is not None:
        if row >= end:
            return
        gamma = of_group(gamma, group)
        beta = of_group(beta, group)
    o_m = row + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_n = o_n < N
    m_m = o_m < end
    mask = m_m[:, None] & m_n[None, :]
    tile = o_m[:, None] * N + o_n[None, :]
    total = tl.load(at(h, o_m, o_n), mask=mask, other=0.0)
    if branch is not None:
        added = tl.load(at(branch, o_m, o_n), mask=mask, other=0.0).to(tl.float32)
        added *= columns(layer_scale, o_n, N, 1.0)
        added *= _of_samples(drop_path, o_m, m_m, each)
        total = (total.to(tl.float32) + added).to(p_total.dtype.element_ty)
        tl.store(p_total + tile, total, mask=mask)
    normed, mean, rstd = normalize(total.to(tl.float32), m_n, N, eps)
    normed = affine(normed, gamma, beta, o_n, N)
    tl.store(p_normed + tile, normed.to(p_normed.dtype.element_ty), mask=mask)
    tl.store(p_mean + o_m, mean, mask=m_m)
    tl.store(p_rstd + o_m, rstd, mask=m_m)


@triton.jit(do_not_specialize=["M", "each", "chunk", "groups"])
def _normalize_backward_kernel(
    p_total,
    grad_total,
    grad_normed,
    branch,
    layer_scale,
    drop_path,
    p_mean,
    p_rstd,
    gamma,
    p_grad_h,
    p_grad_branch,
    p_layer_sums,
    p_gamma_sums,
    p_beta_sums,
    M,
    N,
    each,
    chunk,
    stride_sums,
    p_offsets,
    groups,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Gradients of h and branch in one chunk of rows, and what it adds to those of the vectors.

    What is not wanted is None, and so is a gradient that did not come. The branch is only read for
    the gradient of γ; without one it counts as 1, which makes that the sum of the rows' gradients.
    """
    pid = tl.program_id(0).to(tl.int64)
    group, first, end = rows_of(p_offsets, groups, M, pid, chunk)
    if p_offsets is not None:
        if first >= end:
            return
        gamma = of_group(gamma, group)
    end = tl.minimum(first + chunk, end)
    o_m = first + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_n = o_n < N
    by_gamma = columns(gamma, o_n, N, 1.0)
    by_layer = columns(layer_scale, o_n, N, 1.0)
    # Rows are added up value by value, and across warps once, at the end.
    layer_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    gamma_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    beta_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    # Rows are on their way while those before them are computed with. Without products in a loop
    # Triton only does this where it is told so here.
    for m in tl.range(0, chunk, BLOCK_M, num_stages=STAGES):
        rows = o_m + m
        m_m = rows < end
        mask = m_m[:, None] & m_n[None, :]
        tile = rows[:, None] * N + o_n[None, :]
        grad = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        if grad_total is not None:
            grad = tl.load(at(grad_total, rows, o_n), mask=mask, other=0.0).to(tl.float32)
        if branch is not None:
            added = tl.load(at(branch, rows, o_n), mask=mask, other=0.0).to(tl.float32)
        if grad_normed is not None:
            upper = tl.load(at(grad_normed, rows, o_n), mask=mask, other=0.0).to(tl.float32)
            total = tl.load(p_total + tile, mask=mask, other=0.0).to(tl.float32)
            mean = tl.load(p_mean + rows, mask=m_m, other=0.0)
            rstd = tl.load(p_rstd + rows, mask=m_m, other=0.0)
            by_norm, normalized = normalize_backward(upper * by_gamma, total, mean, rstd, mask, N)
            grad += by_norm
            if p_gamma_sums is not None:
                gamma_sums += upper * normalized
            if p_beta_sums is not None:
                beta_sums += upper
        if p_grad_h is not None:
            tl.store(p_grad_h + tile, grad.to(p_grad_h.dtype.element_ty), mask=mask)
        scaled = grad * _of_samples(drop_path, rows, m_m, each)
        if p_layer_sums is not None:
            layer_sums += scaled * added if branch is not None else scaled
        if p_grad_branch is not None:
            scaled *= by_layer
            tl.store(p_grad_branch + tile, scaled.to(p_grad_branch.dtype.element_ty), mask=mask)
    row = pid * stride_sums + o_n
    if p_layer_sums is not None:
        tl.store(p_layer_sums + row, tl.sum(layer_sums, 0), mask=m_n)
    if p_gamma_sums is not None:
        tl.store(p_gamma_sums + row, tl.sum(gamma_sums, 0), mask=m_n)
    if p_beta_sums is not None:
        tl.store(p_beta_sums + row, tl.sum(beta_sums, 0), mask=m_n)


def normalize_rows(
    h: Tensor,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    norm_weight: Operand | Parameter | None,
    norm_bias: Operand | Parameter | None,
    eps: float,
    total: Tensor | None,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    groups: Groups | None = None,
) -> None:
    """Fills the sum, LN of it and the statistics; without a branch, LN of h and the statistics.

    With groups each has a norm of its own, a parameter in place of an operand.
    """
    rows, features = h.shape
    config = configs.normalize_rows(h.dtype, _dtype_of(norm_weight, h.dtype), features)
    tiles, *found_by = in_chunks(rows, config["BLOCK_M"], groups)
    launch(
        _normalize_kernel,
        (tiles,),
        *map(operand, (h, branch, layer_scale, drop_path_scale)),
        norm_weight,
        norm_bias,
        total,
        normed,
        mean,
        rstd,
        rows,
        features,
        _rows_of_each(rows, drop_path_scale),
        eps,
        *found_by,
        **config,
    )


def normalize_rows_backward(
    grad_total: Tensor | None,
    grad_normed: Tensor | None,
    branch: Tensor | None,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Operand | Parameter | None,
    grad_h: Tensor | None,
    grad_branch: Tensor | None,
    vectors: Sequence[torch.dtype | None],
    groups: Groups | None = None,
) -> list[Tensor]:
    """Fills the gradients of h and branch where they are wanted.

    Returns:
        Of the gradients of layer_scale, norm_weight and norm_bias those to which ``vectors`` gives
        a dtype; with groups (groups, N). Without a branch the first is the sum of the rows of
        grad_h, before it is rounded.
    """
    rows, features = total.shape
    norm = _dtype_of(norm_weight, total.dtype)
    config = configs.normalize_rows_backward(total.dtype, norm, features)
    chunk = configs.chunk(rows, config["BLOCK_M"], config.pop("CTAS_PER_SM"), total.device)
    chunks, *found_by = in_chunks(rows, chunk, groups)
    wanted = [dtype for dtype in vectors if dtype is not None]
    partial = torch.empty((chunks, len(wanted), features), dtype=torch.float32, device=total.device)
    columns = iter(partial.unbind(1))
    if vectors[0] is None:
        branch = None  # nothing needs it
    launch(
        _normalize_backward_kernel,
        (chunks,),
        total,
        *map(operand, (grad_total, grad_normed, branch, layer_scale, drop_path_scale)),
        mean,
        rstd,
        norm_weight,
        grad_h,
        grad_branch,
        *(None if dtype is None else next(columns) for dtype in vectors),
        rows,
        features,
        _rows_of_each(rows, drop_path_scale),
        chunk,
        partial.stride(0),
        *found_by,
        # Fused, a product is rounded in one term of a difference and not in the other. Where they
        # cancel, as in rows of one value, 1/σ makes much of what that leaves. Bytes bound this
        # kernel, so it costs nothing.
        enable_fp_fusion=False,
        **config,
    )
    if groups is None:
        return sum_partials(partial, wanted)
    sums = zip(partial.unbind(1), wanted, strict=True)
    return [sum_chunks(column, chunk, dtype, groups) for column, dtype in sums]


def residual_layer_norm_forward(
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(sum, LN(sum), mean, 1/σ); see :func:`snkernels.reference.residual` and ``layer_norm``."""
    dtype = torch.promote_types(x.dtype, branch.dtype)
    outputs = norm_outputs(x, x.shape[1], dtype, normed_dtype)
    norm = operand(norm_weight), operand(norm_bias)
    normalize_rows(x, branch, layer_scale, drop_path_scale, *norm, eps, *outputs)
    return outputs


def residual_layer_norm_backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """See ``residual_backward`` and ``layer_norm_backward`` of :mod:`snkernels.reference`."""
    grad_x, grad_branch = (
        torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device) if need else None
        for tensor, need in zip((x, branch), needs[:2], strict=True)
    )
    vectors = [
        vector.dtype if need and vector is not None else None
        for vector, need in zip((layer_scale, norm_weight, norm_bias), needs[2:], strict=True)
    ]
    sums = normalize_rows_backward(
        grad_sum,
        grad_normed,
        branch,
        layer_scale,
        drop_path_scale,
        total,
        mean,
        rstd,
        operand(norm_weight),
        grad_x,
        grad_branch,
        vectors,
    )
    return [grad for grad in (grad_x, grad_branch) if grad is not None] + sums


def _rows_of_each(rows: int, drop_path_scale: Tensor | None) -> int:
    return 1 if drop_path_scale is None else max(1, rows // max(1, drop_path_scale.shape[0]))


def _dtype_of(norm_weight: Operand | Parameter | None, otherwise: torch.dtype) -> torch.dtype:
    if isinstance(norm_weight, Parameter):
        norm_weight = norm_weight.one
    return otherwise if norm_weight is None else norm_weight.data.dtype
