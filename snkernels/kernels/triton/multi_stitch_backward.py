"""The gradients of ``multi_stitch`` and ``multi_stitch_layer_norm`` in Triton.

Gradients of one kind are computed for all groups in one buffer, by sums over the chunks of each
group's rows in a fixed order, and copied from there, as new tensors would have new addresses.

Compiled and interpreted, never run on a GPU yet.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.triton import configs
from snkernels.kernels.triton.groups import (
    BIAS,
    LORA_A,
    LORA_B,
    NORM_BIAS,
    NORM_WEIGHT,
    WEIGHT,
    Groups,
    bounds,
    find,
    of_group,
)
from snkernels.kernels.triton.launch import dot_precision, launch
from snkernels.kernels.triton.multi_stitch import low_rank, project
from snkernels.kernels.triton.norms import columns, normalize_backward
from snkernels.kernels.triton.operands import Operand, at, operand
from snkernels.kernels.triton.products import outer_tile
from snkernels.kernels.triton.sums import sum_of_rows


@triton.jit(do_not_specialize=["M", "groups", "chunk"])
def _layer_norm_groups_backward_kernel(
    grad_normed,
    grad_y,
    p_y,
    p_mean,
    p_rstd,
    gamma,
    p_grad,
    p_partial,
    p_offsets,
    M,
    groups,
    N,
    chunk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The gradient of y in one chunk of a group's rows, and what it adds to other gradients.

    ``partial`` is (chunks, 3, N): the sums for norm weight, norm bias and bias, in this order.
    """
    pid = tl.program_id(0).to(tl.int64)
    group, first, end = find(p_offsets, groups, M, pid, chunk)
    if first >= end:
        return
    end = tl.minimum(first + chunk, end)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_n = o_n < N
    gamma = of_group(gamma, group)
    # Rows are added up value by value, and across warps once, at the end.
    gamma_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    beta_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m in range(0, chunk, BLOCK_M):
        rows = first + m + tl.arange(0, BLOCK_M)
        m_m = rows < end
        mask = m_m[:, None] & m_n[None, :]
        tile = rows[:, None] * N + o_n[None, :]
        upper = tl.load(at(grad_normed, rows, o_n), mask=mask, other=0.0).to(tl.float32)
        y = tl.load(p_y + tile, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(p_mean + rows, mask=m_m, other=0.0)
        rstd = tl.load(p_rstd + rows, mask=m_m, other=0.0)
        weighted = tl.where(mask, upper * columns(gamma, o_n, N, 1.0), 0.0)
        grad, normalized = normalize_backward(weighted, y, mean, rstd, mask, N)
        if grad_y is not None:
            grad += tl.load(at(grad_y, rows, o_n), mask=mask, other=0.0).to(tl.float32)
        tl.store(p_grad + tile, grad.to(p_grad.dtype.element_ty), mask=mask)
        gamma_sums += upper * normalized
        beta_sums += upper
        bias_sums += tl.where(mask, grad, 0.0)
    tl.store(p_partial + pid * 3 * N + o_n, tl.sum(gamma_sums, 0), mask=m_n)
    tl.store(p_partial + (pid * 3 + 1) * N + o_n, tl.sum(beta_sums, 0), mask=m_n)
    tl.store(p_partial + (pid * 3 + 2) * N + o_n, tl.sum(bias_sums, 0), mask=m_n)


@triton.jit(do_not_specialize=["M", "groups", "chunk"])
def _outer_groups_kernel(
    left,
    right,
    p_out,
    p_offsets,
    M,
    groups,
    P,
    Q,
    chunk,
    strides_out,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """out[i] = leftᵀ right over the i-th chunk, of rows of one group."""
    chunk_id = tl.program_id(1).to(tl.int64)
    _, start, end = find(p_offsets, groups, M, chunk_id, chunk)
    if start >= end:
        return
    out = Operand(p_out + chunk_id * P * Q, strides_out)
    end = tl.minimum(start + chunk, end)
    outer_tile(left, right, out, start, end, P, Q, PRECISION, BLOCK_M, BLOCK_P, BLOCK_Q)


@triton.jit(do_not_specialize=["M", "groups", "chunk"])
def _sum_chunks_kernel(
    matrix,
    p_out,
    p_offsets,
    M,
    groups,
    N,
    chunk,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[i] = the sum of the i-th chunk, of rows of one group."""
    chunk_id = tl.program_id(1).to(tl.int64)
    _, start, end = find(p_offsets, groups, M, chunk_id, chunk)
    if start >= end:
        return
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = sum_of_rows(matrix, o_n, start, tl.minimum(start + chunk, end), N, BLOCK_M)
    tl.store(p_out + chunk_id * N + o_n, total, mask=o_n < N)


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


def multi_stitch_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    group_offsets: Tensor | list[int],
    tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of x and the tensors that ``needs`` marks, in order."""
    inputs = (x, *tensors)
    upper = grad_y if grad_normed is None else grad_normed
    assert upper is not None
    if upper.numel() == 0:
        pairs = zip(inputs, needs, strict=True)
        return [torch.zeros_like(t) for t, need in pairs if need and t is not None]
    groups = Groups(x, group_offsets, tensors, scalings, upper.shape[1])
    found: list[Tensor | None] = [None] * 6

    def needed(role: int) -> bool:
        own = zip(tensors[role::6], needs[1 + role :: 6], strict=True)
        return any(need and tensor is not None for tensor, need in own)

    if grad_normed is None:
        grad = upper
        if needed(BIAS):
            found[BIAS] = _column_sums(groups, grad, BIAS)
    else:
        assert y is not None and mean is not None and rstd is not None
        grad, partial, chunk = _layer_norm_backward(groups, grad_y, grad_normed, y, mean, rstd)
        for i, role in enumerate((NORM_WEIGHT, NORM_BIAS, BIAS)):
            if needed(role):
                found[role] = _sums(groups, partial[:, i], chunk, role)
    need_A, need_B = needed(LORA_A), needed(LORA_B)
    low_grad = low_rank(groups, grad, LORA_B) if needs[0] or need_A else None
    if needed(WEIGHT):
        found[WEIGHT] = _outer(groups, grad, x, WEIGHT)
    if need_A and low_grad is not None:
        found[LORA_A] = _outer(groups, x, low_grad, LORA_A, transposed=True)
    if need_B:
        low = low_rank(groups, x)
        assert low is not None
        found[LORA_B] = _outer(groups, grad, low, LORA_B)

    grads: list[Tensor] = []
    if needs[0]:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grads.append(project(groups, grad, grad_x, WEIGHT, transposed=True, low=low_grad))
    own: list[Tensor] = []
    stacked: list[Tensor] = []
    for i, (tensor, need) in enumerate(zip(tensors, needs[1:], strict=True)):
        whole = found[i % 6]
        if need and tensor is not None and whole is not None:
            own.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device))
            stacked.append(whole[i // 6][tuple(map(slice, tensor.shape))])  # all, or a lower rank's
    if own:
        # Outputs of an op must not share memory. One launch, which reads no table of addresses.
        torch._foreach_copy_(own, stacked)
    return grads + own


def _layer_norm_backward(
    groups: Groups,
    grad_y: Tensor | None,
    grad_normed: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, int]:
    """The gradient of y, the chunks' sums for norm weight, norm bias and bias, and their rows."""
    rows, features = y.shape
    config = configs.normalize_rows_backward(features)
    ctas = config.pop("CTAS_PER_SM")
    chunk, _ = configs.chunks(rows, config["BLOCK_M"], ctas, y.device)
    chunks = groups.tiles(chunk)
    grad = torch.empty((rows, features), dtype=y.dtype, device=y.device)
    partial = torch.empty((chunks, 3, features), dtype=torch.float32, device=y.device)
    launch(
        _layer_norm_groups_backward_kernel,
        (chunks,),
        operand(grad_normed),
        operand(grad_y),
        y,
        mean,
        rstd,
        groups.parameter(NORM_WEIGHT),
        grad,
        partial,
        groups.offsets,
        rows,
        groups.count,
        features,
        chunk,
        **config,
    )
    return grad, partial, chunk


def _outer(
    groups: Groups, left: Tensor, right: Tensor, role: int, transposed: bool = False
) -> Tensor:
    """leftᵀ right of each group: (groups, P, Q), or (groups, Q, P) if transposed."""
    (rows, height), width = left.shape, right.shape[1]
    shape = (width, height) if transposed else (height, width)
    precision = dot_precision(left.dtype)
    config = configs.outer(left.dtype, precision, width)
    tiles = triton.cdiv(height, config["BLOCK_P"]) * triton.cdiv(width, config["BLOCK_Q"])
    chunks = max(1, min(256 // max(1, tiles), rows // (2 * config["BLOCK_M"])))
    chunk = triton.cdiv(rows, chunks)
    size = groups.tiles(chunk), height * width
    partial = torch.empty(size, dtype=torch.float32, device=left.device)
    launch(
        _outer_groups_kernel,
        (tiles, size[0]),
        operand(left),
        operand(right),
        partial,
        groups.offsets,
        rows,
        groups.count,
        height,
        width,
        chunk,
        (1, height) if transposed else (width, 1),
        PRECISION=precision,
        **config,
    )
    return _sums(groups, partial, chunk, role).view(groups.count, *shape)


def _sums(groups: Groups, partial: Tensor, chunk: int, role: int) -> Tensor:
    """The sums over each group's chunks, (groups, width), in the dtype of a role."""
    like, width = groups.one(role), partial.shape[1]
    assert like is not None
    sums = torch.empty((groups.count, width), dtype=like.dtype, device=partial.device)
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


def _column_sums(groups: Groups, matrix: Tensor, role: int) -> Tensor:
    """The sums over each group's rows, (groups, N), in the dtype of a role."""
    rows, width = matrix.shape
    chunk = triton.cdiv(rows, max(1, min(128, rows // 32)))
    chunks = groups.tiles(chunk)
    partial = torch.empty((chunks, width), dtype=torch.float32, device=matrix.device)
    config = configs.sum_rows()
    launch(
        _sum_chunks_kernel,
        (triton.cdiv(width, config["BLOCK_N"]), chunks),
        operand(matrix),
        partial,
        groups.offsets,
        rows,
        groups.count,
        width,
        chunk,
        **config,
    )
    return _sums(groups, partial, chunk, role)
