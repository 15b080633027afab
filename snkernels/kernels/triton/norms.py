"""LayerNorm of rows that are held in registers, forward and backward, as kernels share it."""

import triton
import triton.language as tl

from snkernels.kernels.triton.operands import store_tile


@triton.jit
def normalize(y, m_n, N, eps):
    """Makes ((y - mean) / σ, mean, 1/σ) of whole rows, two-pass; y is fp32 and zero past N."""
    mean = tl.sum(y, 1) / N
    centred = tl.where(m_n[None, :], y - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 1) / N + eps)
    return centred * rstd[:, None], mean, rstd


@triton.jit
def columns(vector, o_n, N, ABSENT: tl.constexpr):
    """Values ``o_n`` of a vector as a row in fp32; ABSENT where it is None."""
    if vector is None:
        return ABSENT
    else:
        values = tl.load(vector.data + o_n * vector.strides[0], mask=o_n < N, other=0.0)
        return values.to(tl.float32)[None, :]


@triton.jit
def affine(normed, gamma, beta, o_n, N):
    """Columns ``o_n`` of normed · gamma + beta, of which either may be None."""
    return normed * columns(gamma, o_n, N, 1.0) + columns(beta, o_n, N, 0.0)


@triton.jit
def normalize_backward(weighted, y, mean, rstd, mask, N):
    """Makes (the gradient of y, y normalised) of whole rows, in fp32.

    ``weighted`` is the gradient of the normalised rows; it and y are zero outside ``mask``.
    """
    normalized = tl.where(mask, (y - mean[:, None]) * rstd[:, None], 0.0)
    # Both at once, for half the barriers where a row lies across warps.
    along_mean, along_normalized = tl.split(tl.sum(tl.join(weighted, weighted * normalized), 1) / N)
    grad = weighted - along_mean[:, None] - normalized * along_normalized[:, None]
    return rstd[:, None] * grad, normalized


@triton.jit
def store_rows(
    tiles,
    p_y,
    p_normed,
    p_mean,
    p_rstd,
    gamma,
    beta,
    row,
    M,
    N,
    eps,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """Stores BLOCK_M whole rows of y from ``row`` on, held as tiles, of LN(y), its statistics."""
    dtype = p_y.dtype.element_ty
    o_m = row + tl.arange(0, BLOCK_M)
    o_n = tl.arange(0, BLOCK_N).to(tl.int64)
    y = ()
    total = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(TILES):
        y += (tiles[i].to(dtype),)
        # Columns past the last hold zeros: weight and bias are zero there.
        total += tl.sum(y[i].to(tl.float32), 1)
        store_tile(p_y, y[i], o_m, o_n + i * BLOCK_N, M, N)
    mean = total / N
    squares = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(TILES):
        centred = y[i].to(tl.float32) - mean[:, None]
        squares += tl.sum(tl.where(o_n[None, :] + i * BLOCK_N < N, centred * centred, 0.0), 1)
    rstd = tl.rsqrt(squares / N + eps)
    tl.store(p_mean + o_m, mean, mask=o_m < M)
    tl.store(p_rstd + o_m, rstd, mask=o_m < M)
    for i in tl.static_range(TILES):
        normed = (y[i].to(tl.float32) - mean[:, None]) * rstd[:, None]
        normed = affine(normed, gamma, beta, o_n + i * BLOCK_N, N)
        store_tile(p_normed, normed, o_m, o_n + i * BLOCK_N, M, N)
