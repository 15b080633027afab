"""``multi_stitch`` and ``multi_stitch_layer_norm`` in Triton: a stitch for each group of rows.

The kernels are those of the single stitch, whose bodies they share, but for where a program finds
its work. Tiles of rows never cross groups: a program finds group and rows by a search over the
offsets in device memory, and then the addresses of the group's parameters in a table, so nothing is
stacked, the grid follows from sizes that the host knows, and the call does not wait for the GPU.
Offsets are clamped to the rows of x: wrong ones give wrong results, and never a fault.

All groups of a call share the dtype and strides of a parameter, which the launches take as
arguments. Where groups differ there, or in rank, that parameter is copied, as fp32 if dtypes do;
such a call cannot be captured in a graph, as copies have new addresses each time. Gradients of one
kind are computed in one buffer and copied from there, as new tensors have new addresses too.

Compiled and interpreted, never run on a GPU yet.
"""

import struct
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.native import norm_outputs
from snkernels.kernels.on_device import NOT_WARM, on_device
from snkernels.kernels.triton import configs
from snkernels.kernels.triton.launch import dot_precision, launch, strides
from snkernels.kernels.triton.norms import affine, normalize, normalize_backward
from snkernels.kernels.triton.products import outer_tile, project_tiles
from snkernels.kernels.triton.stitch_layer_norm import store_rows
from snkernels.kernels.triton.sums import sum_of_rows

WEIGHT, BIAS, LORA_A, LORA_B, NORM_WEIGHT, NORM_BIAS = range(6)
_SEARCH = tl.constexpr(128)  # offsets at a time


@triton.jit
def _bounds(p_offsets, group, M):
    """Makes (start, end) of a group's rows, within those of x."""
    start = tl.load(p_offsets + group)
    end = tl.load(p_offsets + (group + 1))
    return tl.minimum(tl.maximum(start, 0), M), tl.minimum(tl.maximum(end, 0), M)


@triton.jit
def _find(p_offsets, groups, M, tile, size):
    """Makes (group, first row, end) of a tile of at most ``size`` rows; first ≥ end if of none.

    Group g has the tiles from offsets[g] // size + g on, to where the next one's begin. Those are
    enough wherever its rows lie, and the host knows how many there are in all: M // size + groups.
    """
    M = tl.cast(M, tl.int64)
    tile = tl.cast(tile, tl.int64)
    begun = tl.zeros([_SEARCH], tl.int32)
    for first in range(0, groups, _SEARCH):
        o_g = first + tl.arange(0, _SEARCH).to(tl.int64)
        start = tl.load(p_offsets + o_g, mask=o_g < groups, other=0)
        start = tl.minimum(tl.maximum(start, 0), M)
        begun += ((o_g < groups) & (start // size + o_g <= tile)).to(tl.int32)
    group = tl.maximum(tl.sum(begun, 0) - 1, 0).to(tl.int64)
    start, end = _bounds(p_offsets, group, M)
    row = start + (tile - start // size - group) * size
    # Of offsets that do not rise, a tile may come to lie before its group.
    return group, tl.where(row < start, end, row), end


@triton.jit
def _parameter(p_table, group, p_like):
    """The address in a row of the table, as a pointer like ``p_like``; None where that is None."""
    if p_like is None:
        return None
    else:
        return tl.multiple_of(tl.load(p_table + group).to(p_like.dtype), 16)


@triton.jit
def _rank(p_table_b, group, p_low, R):
    """R, or 0 for a group without a low-rank part."""
    if p_low is None:
        return 0
    else:
        return tl.where(tl.load(p_table_b + group) == 0, 0, R)


@triton.jit(do_not_specialize=["M", "groups"])
def _project_groups_kernel(
    p_x,
    p_w,
    p_bias,
    p_low,
    p_b,
    p_y,
    p_offsets,
    p_table_w,
    p_table_bias,
    p_table_b,
    p_scalings,
    M,
    groups,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_bn,
    stride_br,
    NARROW: tl.constexpr,
    IDENTITY: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """One tile of y = x wᵀ + low bᵀ + bias. IDENTITY: or of x itself where a group has no w.

    NARROW: of y = scaling · x wᵀ instead, or of zeros.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    pid = tl.program_id(0)
    group, first, end = _find(p_offsets, groups, M, pid // blocks_n, BLOCK_M)
    if first >= end:
        return
    o_m = first + tl.arange(0, BLOCK_M)
    o_n = (pid % blocks_n).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    if NARROW:
        (y,) = project_tiles(
            p_x,
            _parameter(p_table_w, group, p_w),
            None,
            None,
            None,
            o_m,
            o_n,
            end,
            N,
            tl.where(tl.load(p_table_w + group) == 0, 0, K),
            0,
            stride_xm,
            stride_xk,
            stride_wn,
            stride_wk,
            0,
            0,
            0,
            0,
            PRECISION,
            BLOCK_K,
            BLOCK_R,
            TILES=1,
        )
        y *= tl.load(p_scalings + group).to(tl.float32)
    elif IDENTITY and tl.load(p_table_w + group) == 0:
        mask = (o_m[:, None] < end) & (o_n[None, :] < N)
        y = tl.load(p_x + o_m[:, None] * stride_xm + o_n[None, :] * stride_xk, mask=mask, other=0.0)
        y = y.to(tl.float32)
    else:
        (y,) = project_tiles(
            p_x,
            _parameter(p_table_w, group, p_w),
            _parameter(p_table_bias, group, p_bias),
            p_low,
            _parameter(p_table_b, group, p_b),
            o_m,
            o_n,
            end,
            N,
            K,
            _rank(p_table_b, group, p_low, R),
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
            TILES=1,
        )
    mask = (o_m[:, None] < end) & (o_n[None, :] < N)
    tl.store(p_y + o_m[:, None] * N + o_n[None, :], y.to(p_y.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "groups"])
def _row_groups_kernel(
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
    p_offsets,
    p_table_w,
    p_table_bias,
    p_table_b,
    p_table_gamma,
    p_table_beta,
    M,
    groups,
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
    """Whole rows of y and LN(y), held as TILES tiles of columns. No group is the identity."""
    group, first, end = _find(p_offsets, groups, M, tl.program_id(0), BLOCK_M)
    if first >= end:
        return
    o_m = first + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    tiles = project_tiles(
        p_x,
        _parameter(p_table_w, group, p_w),
        _parameter(p_table_bias, group, p_bias),
        p_low,
        _parameter(p_table_b, group, p_b),
        o_m,
        o_n,
        end,
        N,
        K,
        _rank(p_table_b, group, p_low, R),
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
        _parameter(p_table_gamma, group, p_gamma),
        _parameter(p_table_beta, group, p_beta),
        o_m,
        o_n,
        end,
        N,
        eps,
        stride_gamma,
        stride_beta,
        TILES,
    )


@triton.jit(do_not_specialize=["M", "groups"])
def _layer_norm_groups_kernel(
    p_y,
    p_gamma,
    p_beta,
    p_normed,
    p_mean,
    p_rstd,
    p_offsets,
    p_table_gamma,
    p_table_beta,
    M,
    groups,
    N,
    eps,
    stride_gamma,
    stride_beta,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """LN(y) and its statistics, BLOCK_M whole rows of one group in registers."""
    group, first, end = _find(p_offsets, groups, M, tl.program_id(0), BLOCK_M)
    if first >= end:
        return
    o_m = first + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_n = o_n < N
    mask = (o_m[:, None] < end) & m_n[None, :]
    tile = o_m[:, None] * N + o_n[None, :]
    y = tl.load(p_y + tile, mask=mask, other=0.0).to(tl.float32)
    normed, mean, rstd = normalize(y, m_n, N, eps)
    p_gamma = _parameter(p_table_gamma, group, p_gamma)
    p_beta = _parameter(p_table_beta, group, p_beta)
    normed = affine(normed, p_gamma, p_beta, o_n, N, stride_gamma, stride_beta)
    tl.store(p_normed + tile, normed.to(p_normed.dtype.element_ty), mask=mask)
    tl.store(p_mean + o_m, mean, mask=o_m < end)
    tl.store(p_rstd + o_m, rstd, mask=o_m < end)


@triton.jit(do_not_specialize=["M", "groups", "chunk"])
def _layer_norm_groups_backward_kernel(
    p_grad_normed,
    p_grad_y,
    p_y,
    p_mean,
    p_rstd,
    p_gamma,
    p_grad,
    p_partial,
    p_offsets,
    p_table_gamma,
    M,
    groups,
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
    """The gradient of y in one chunk of a group's rows, and what it adds to other gradients.

    ``partial`` is (chunks, 3, N): the sums for norm weight, norm bias and bias, in this order.
    """
    pid = tl.program_id(0).to(tl.int64)
    group, first, end = _find(p_offsets, groups, M, pid, chunk)
    if first >= end:
        return
    end = tl.minimum(first + chunk, end)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    m_n = o_n < N
    p_gamma = _parameter(p_table_gamma, group, p_gamma)
    # Rows are added up value by value, and across warps once, at the end.
    gamma_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    beta_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    bias_sums = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for m in range(0, chunk, BLOCK_M):
        rows = first + m + tl.arange(0, BLOCK_M)
        m_m = rows < end
        mask = m_m[:, None] & m_n[None, :]
        tile = rows[:, None] * N + o_n[None, :]
        p_rows = p_grad_normed + rows[:, None] * stride_nm + o_n[None, :] * stride_nn
        grad_normed = tl.load(p_rows, mask=mask, other=0.0).to(tl.float32)
        y = tl.load(p_y + tile, mask=mask, other=0.0).to(tl.float32)
        mean = tl.load(p_mean + rows, mask=m_m, other=0.0)
        rstd = tl.load(p_rstd + rows, mask=m_m, other=0.0)
        weighted = affine(grad_normed, p_gamma, None, o_n, N, stride_gamma, 0)
        weighted = tl.where(mask, weighted, 0.0)
        grad, normalized = normalize_backward(weighted, y, mean, rstd, mask, N)
        if p_grad_y is not None:
            p_rows = p_grad_y + rows[:, None] * stride_ym + o_n[None, :] * stride_yn
            grad += tl.load(p_rows, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_grad + tile, grad.to(p_grad.dtype.element_ty), mask=mask)
        gamma_sums += grad_normed * normalized
        beta_sums += grad_normed
        bias_sums += tl.where(mask, grad, 0.0)
    tl.store(p_partial + pid * 3 * N + o_n, tl.sum(gamma_sums, 0), mask=m_n)
    tl.store(p_partial + (pid * 3 + 1) * N + o_n, tl.sum(beta_sums, 0), mask=m_n)
    tl.store(p_partial + (pid * 3 + 2) * N + o_n, tl.sum(bias_sums, 0), mask=m_n)


@triton.jit(do_not_specialize=["M", "groups", "chunk"])
def _outer_groups_kernel(
    p_left,
    p_right,
    p_out,
    p_offsets,
    M,
    groups,
    P,
    Q,
    chunk,
    stride_lm,
    stride_lp,
    stride_rm,
    stride_rq,
    stride_op,
    stride_oq,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """out[i] = leftᵀ right over the i-th chunk, of rows of one group."""
    chunk_id = tl.program_id(1).to(tl.int64)
    _, first, end = _find(p_offsets, groups, M, chunk_id, chunk)
    if first >= end:
        return
    outer_tile(
        p_left,
        p_right,
        p_out + chunk_id * P * Q,
        first,
        tl.minimum(first + chunk, end),
        P,
        Q,
        stride_lm,
        stride_lp,
        stride_rm,
        stride_rq,
        stride_op,
        stride_oq,
        PRECISION,
        BLOCK_M,
        BLOCK_P,
        BLOCK_Q,
    )


@triton.jit(do_not_specialize=["M", "groups", "chunk"])
def _sum_chunks_kernel(
    p_in,
    p_out,
    p_offsets,
    M,
    groups,
    N,
    chunk,
    stride_m,
    stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[i] = the sum of the i-th chunk, of rows of one group."""
    chunk_id = tl.program_id(1).to(tl.int64)
    _, first, end = _find(p_offsets, groups, M, chunk_id, chunk)
    if first >= end:
        return
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.minimum(first + chunk, end)
    total = sum_of_rows(p_in, o_n, first, end, N, stride_m, stride_n, BLOCK_M)
    tl.store(p_out + chunk_id * N + o_n, total, mask=o_n < N)


@triton.jit(do_not_specialize=["M", "chunk"])
def _sum_groups_kernel(
    p_partial,
    p_out,
    p_offsets,
    M,
    N,
    chunk,
    stride_m,
    stride_n,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out[g] = the sum over the chunks of group g."""
    group = tl.program_id(1).to(tl.int64)
    start, end = _bounds(p_offsets, group, tl.cast(M, tl.int64))
    first = start // chunk + group
    chunks = tl.cdiv(tl.maximum(end - start, 0), chunk)
    o_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = sum_of_rows(p_partial, o_n, first, first + chunks, N, stride_m, stride_n, BLOCK_M)
    tl.store(p_out + group * N + o_n, total.to(p_out.dtype.element_ty), mask=o_n < N)


class _Call:
    """What the launches of a call share: offsets and parameters of its groups, and their table."""

    def __init__(
        self,
        x: Tensor,
        group_offsets: Tensor,
        tensors: Sequence[Tensor | None],
        scalings: Sequence[float],
        features: int,
    ) -> None:
        self.x, self.groups = x, len(scalings)
        self.offsets = group_offsets
        if group_offsets.device != x.device:
            self.offsets = on_device(tuple(group_offsets.tolist()), x.device)
        roles = [list(tensors[i::6]) for i in range(6)]
        self.rank = max(0 if a is None else a.shape[0] for a in roles[LORA_A])
        self.has_identity = any(weight is None for weight in roles[WEIGHT])
        for role, value in ((BIAS, 0.0), (NORM_WEIGHT, 1.0), (NORM_BIAS, 0.0)):
            _fill_in(roles[role], value, features)
        # Copies live as long as the call: until its launches are in the stream.
        self.parameters = [_alike(role) for role in roles]
        table = [[0 if p is None else p.data_ptr() for p in role] for role in self.parameters]
        table += [[struct.unpack("q", struct.pack("d", s))[0] for s in scalings]]
        # Rows of whole 16 bytes, or what was compiled would depend on the number of groups.
        padding = [0] * (self.groups % 2)
        values = tuple(value for row in table for value in (*row, *padding))
        *self.table, bits = on_device(values, x.device).view(len(table), -1).unbind()
        self.scalings = bits.view(torch.float64)

    def one(self, role: int) -> Tensor | None:
        """Any group's tensor, for dtype and strides; None where no group has one."""
        return next((p for p in self.parameters[role] if p is not None), None)

    def tiles(self, size: int) -> int:
        """How many tiles of ``size`` rows are enough for the groups, wherever they begin."""
        return self.x.shape[0] // size + self.groups

    def project(
        self,
        x: Tensor,
        y: Tensor,
        role: int,
        *,
        transposed: bool = False,
        bias: bool = False,
        low: Tensor | None = None,
    ) -> Tensor:
        """Fills y with x wᵀ for a role's w, or with x w if transposed, and returns it.

        For A and B the result is scaled, for W the rest is added: the bias, and ``low`` times what
        belongs to it, B or, if transposed, Aᵀ.
        """
        narrow = role != WEIGHT
        w, b = self.one(role), self.one(LORA_A if transposed else LORA_B)
        if w is None:  # all groups are the identity, and the kernel will not look
            w = x
        stride_w, stride_b = w.stride(), strides(None if low is None else b, 2)
        if transposed:
            stride_w, stride_b = stride_w[::-1], stride_b[::-1]
        vector = self.one(BIAS) if bias else None
        features = y.shape[1]
        precision = dot_precision(x.dtype)
        config = configs.project(x.dtype, precision, features)
        launch(
            _project_groups_kernel,
            (self.tiles(config["BLOCK_M"]) * triton.cdiv(features, config["BLOCK_N"]),),
            x,
            w,
            vector,
            low,
            None if low is None else b,
            y,
            self.offsets,
            self.table[role],
            self.table[BIAS],
            self.table[LORA_A if transposed else LORA_B],
            self.scalings,
            x.shape[0],
            self.groups,
            features,
            x.shape[1],
            self.rank,
            *x.stride(),
            *stride_w,
            *strides(vector, 1),
            *stride_b,
            NARROW=narrow,
            IDENTITY=self.has_identity,
            PRECISION=precision,
            **config,
        )
        return y

    def low_rank(self, x: Tensor, role: int = LORA_A) -> Tensor | None:
        """S = scaling · x Aᵀ, or scaling · x B of B: (M, largest rank) in fp32."""
        if self.rank == 0:
            return None
        low = torch.empty((x.shape[0], self.rank), dtype=torch.float32, device=x.device)
        return self.project(x, low, role, transposed=role == LORA_B)

    def outer(self, left: Tensor, right: Tensor, role: int, transposed: bool = False) -> Tensor:
        """leftᵀ right of each group: (groups, P, Q), or (groups, Q, P) if transposed."""
        (rows, height), width = left.shape, right.shape[1]
        shape = (width, height) if transposed else (height, width)
        precision = dot_precision(left.dtype)
        config = configs.outer(left.dtype, precision, width)
        tiles = triton.cdiv(height, config["BLOCK_P"]) * triton.cdiv(width, config["BLOCK_Q"])
        chunks = max(1, min(256 // max(1, tiles), rows // (2 * config["BLOCK_M"])))
        chunk = triton.cdiv(rows, chunks)
        size = self.tiles(chunk), height * width
        partial = torch.empty(size, dtype=torch.float32, device=left.device)
        launch(
            _outer_groups_kernel,
            (tiles, size[0]),
            left,
            right,
            partial,
            self.offsets,
            rows,
            self.groups,
            height,
            width,
            chunk,
            *left.stride(),
            *right.stride(),
            *((1, height) if transposed else (width, 1)),
            PRECISION=precision,
            **config,
        )
        return self.sums(partial, chunk, role).view(self.groups, *shape)

    def sums(self, partial: Tensor, chunk: int, role: int) -> Tensor:
        """The sums over each group's chunks, (groups, width), in the dtype of a role."""
        like, width = self.one(role), partial.shape[1]
        assert like is not None
        sums = torch.empty((self.groups, width), dtype=like.dtype, device=partial.device)
        config = configs.sum_rows()
        launch(
            _sum_groups_kernel,
            (triton.cdiv(width, config["BLOCK_N"]), self.groups),
            partial,
            sums,
            self.offsets,
            self.x.shape[0],
            width,
            chunk,
            *partial.stride(),
            **config,
        )
        return sums

    def column_sums(self, matrix: Tensor, role: int) -> Tensor:
        """The sums over each group's rows, (groups, N), in the dtype of a role."""
        rows, width = matrix.shape
        chunk = triton.cdiv(rows, max(1, min(128, rows // 32)))
        chunks = self.tiles(chunk)
        partial = torch.empty((chunks, width), dtype=torch.float32, device=matrix.device)
        config = configs.sum_rows()
        launch(
            _sum_chunks_kernel,
            (triton.cdiv(width, config["BLOCK_N"]), chunks),
            matrix,
            partial,
            self.offsets,
            rows,
            self.groups,
            width,
            chunk,
            *matrix.stride(),
            **config,
        )
        return self.sums(partial, chunk, role)


def _fill_in(role: list[Tensor | None], value: float, features: int) -> None:
    """Gives the groups that lack a vector one that changes nothing, if others have it."""
    one = next((vector for vector in role if vector is not None), None)
    if one is None:
        return
    role[:] = [_constant(value, features, one.dtype, one.device) if v is None else v for v in role]


_constants: dict[tuple[float, int, torch.dtype, torch.device], Tensor] = {}


def _constant(value: float, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept for good, as its address is in tables that are kept."""
    key = value, features, dtype, device
    if key not in _constants:
        on_gpu = device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(NOT_WARM)  # it would be filled by replays alone
        _constants[key] = torch.full((features,), value, dtype=dtype, device=device)
        if on_gpu:  # once for good: other streams will read it without an event
            torch.cuda.current_stream(device).synchronize()
    return _constants[key]


def _alike(role: list[Tensor | None]) -> list[Tensor | None]:
    """A role's tensors if they agree in all that launches say of them, or else copies that do.

    Those of a lower rank come to the highest by zeros.
    """
    present = [tensor for tensor in role if tensor is not None]
    dtypes = {tensor.dtype for tensor in present}
    layouts = {(tensor.shape, tensor.stride()) for tensor in present}
    if len(dtypes) <= 1 and len(layouts) <= 1 and not any(t.data_ptr() % 16 for t in present):
        return role
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in present), strict=True)]

    def copy(tensor: Tensor) -> Tensor:
        whole = torch.zeros(shape, dtype=dtype, device=tensor.device)
        whole[tuple(map(slice, tensor.shape))] = tensor
        return whole

    return [None if tensor is None else copy(tensor) for tensor in role]


def multi_stitch_forward(
    x: Tensor,
    group_offsets: Tensor,
    tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    out_features: int,
    normalize: bool,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, LN(y), mean, 1/σ), the last three empty without ``normalize``."""
    if normalize:
        y, normed, mean, rstd = norm_outputs(x, out_features)
    else:
        y = x.new_empty(x.shape[0], out_features)
        normed, mean, rstd = y.new_empty(0), y.new_empty(0), y.new_empty(0)
    if y.numel() == 0:
        return y, normed, mean, rstd
    call = _Call(x, group_offsets, tensors, scalings, out_features)
    low = call.low_rank(x)
    if not normalize:
        call.project(x, y, WEIGHT, bias=True, low=low)
    elif configs.rows_fit(x.dtype, out_features) and not call.has_identity:
        _whole_rows(call, low, y, normed, mean, rstd, eps)
    else:
        call.project(x, y, WEIGHT, bias=True, low=low)
        _layer_norm(call, y, normed, mean, rstd, eps)
    return y, normed, mean, rstd


def _whole_rows(
    call: _Call,
    low: Tensor | None,
    y: Tensor,
    normed: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
) -> None:
    weight, lora_B = call.one(WEIGHT), call.one(LORA_B)
    assert weight is not None
    vectors = [call.one(role) for role in (BIAS, NORM_WEIGHT, NORM_BIAS)]
    config = configs.row(y.shape[1])
    launch(
        _row_groups_kernel,
        (call.tiles(config["BLOCK_M"]),),
        call.x,
        weight,
        vectors[0],
        low,
        lora_B,
        *vectors[1:],
        y,
        normed,
        mean,
        rstd,
        call.offsets,
        *(call.table[role] for role in (WEIGHT, BIAS, LORA_B, NORM_WEIGHT, NORM_BIAS)),
        y.shape[0],
        call.groups,
        y.shape[1],
        call.x.shape[1],
        call.rank,
        eps,
        *call.x.stride(),
        *weight.stride(),
        *strides(vectors[0], 1),
        *strides(lora_B, 2),
        *strides(vectors[1], 1),
        *strides(vectors[2], 1),
        PRECISION=dot_precision(call.x.dtype),
        **config,
    )


def _layer_norm(
    call: _Call, y: Tensor, normed: Tensor, mean: Tensor, rstd: Tensor, eps: float
) -> None:
    norm_weight, norm_bias = call.one(NORM_WEIGHT), call.one(NORM_BIAS)
    config = configs.normalize_rows(y.shape[1])
    launch(
        _layer_norm_groups_kernel,
        (call.tiles(config["BLOCK_M"]),),
        y,
        norm_weight,
        norm_bias,
        normed,
        mean,
        rstd,
        call.offsets,
        call.table[NORM_WEIGHT],
        call.table[NORM_BIAS],
        y.shape[0],
        call.groups,
        y.shape[1],
        eps,
        *strides(norm_weight, 1),
        *strides(norm_bias, 1),
        **config,
    )


def multi_stitch_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    group_offsets: Tensor,
    tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of x and the tensors that ``needs`` marks, in order."""
    inputs = (x, *tensors)
    if y.numel() == 0:
        pairs = zip(inputs, needs, strict=True)
        return [torch.zeros_like(t) for t, need in pairs if need and t is not None]
    call = _Call(x, group_offsets, tensors, scalings, y.shape[1])
    found: list[Tensor | None] = [None] * 6

    def needed(role: int) -> bool:
        own = zip(tensors[role::6], needs[1 + role :: 6], strict=True)
        return any(need and tensor is not None for tensor, need in own)

    if grad_normed is None:
        assert grad_y is not None
        grad = grad_y
        if needed(BIAS):
            found[BIAS] = call.column_sums(grad, BIAS)
    else:
        grad, partial, chunk = _layer_norm_backward(call, grad_y, grad_normed, y, mean, rstd)
        for i, role in enumerate((NORM_WEIGHT, NORM_BIAS, BIAS)):
            if needed(role):
                found[role] = call.sums(partial[:, i], chunk, role)
    need_A, need_B = needed(LORA_A), needed(LORA_B)
    low_grad = call.low_rank(grad, LORA_B) if needs[0] or need_A else None
    if needed(WEIGHT):
        found[WEIGHT] = call.outer(grad, x, WEIGHT)
    if need_A and low_grad is not None:
        found[LORA_A] = call.outer(x, low_grad, LORA_A, transposed=True)
    if need_B:
        low = call.low_rank(x)
        assert low is not None
        found[LORA_B] = call.outer(grad, low, LORA_B)

    grads: list[Tensor] = []
    if needs[0]:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grads.append(call.project(grad, grad_x, WEIGHT, transposed=True, low=low_grad))
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
    call: _Call,
    grad_y: Tensor | None,
    grad_normed: Tensor,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
) -> tuple[Tensor, Tensor, int]:
    """The gradient of y, the chunks' sums for norm weight, norm bias and bias, and their rows."""
    rows, features = y.shape
    norm_weight = call.one(NORM_WEIGHT)
    config = configs.normalize_rows_backward(features)
    ctas = config.pop("CTAS_PER_SM")
    chunk, _ = configs.chunks(rows, config["BLOCK_M"], ctas, y.device)
    chunks = call.tiles(chunk)
    grad = torch.empty((rows, features), dtype=y.dtype, device=y.device)
    partial = torch.empty((chunks, 3, features), dtype=torch.float32, device=y.device)
    launch(
        _layer_norm_groups_backward_kernel,
        (chunks,),
        grad_normed,
        grad_y,
        y,
        mean,
        rstd,
        norm_weight,
        grad,
        partial,
        call.offsets,
        call.table[NORM_WEIGHT],
        rows,
        call.groups,
        features,
        chunk,
        *grad_normed.stride(),
        *strides(grad_y, 2),
        *strides(norm_weight, 1),
        **config,
    )
    return grad, partial, chunk
