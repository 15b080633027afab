"""LayerNorm of rows that are held in registers, forward and backward, as kernels share it."""

import triton
import triton.language as tl


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
