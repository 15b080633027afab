"""The products that kernels share: projected tiles, and an operand that is never rounded."""

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.triton.configs import Config
from snkernels.kernels.triton.norms import columns
from snkernels.kernels.triton.operands import at, described, operand


def factors(x: Tensor, weight: Tensor, config: Config) -> tuple[Any, Any, dict[str, Any]]:
    """The factors of x weightᵀ as :func:`project_tile` takes them, and the options of its kernel.

    They come as descriptors where ``config`` asks for TMA and both can, or else as operands.
    """
    options: dict[str, Any] = {**config, "TMA": 0, "TRANSPOSED": False}
    # Not fp32: from shared memory, exact products take twice the registers, and tf32 has no
    # asynchronous wgmma for a weight by columns.
    if config["TMA"] and x.dtype.itemsize == 2:
        block_m, block_n, block_k = (config[f"BLOCK_{axis}"] for axis in "MNK")
        by_x = described(x, block_m, block_k)
        by_rows = described(weight, block_n, block_k)
        by_w = by_rows or described(weight.t(), block_k, block_n)
        if by_x and by_w:
            return by_x, by_w, {**options, "TMA": 1, "TRANSPOSED": by_rows is not None}
    return operand(x), operand(weight, transposed=True), options


@triton.jit
def project_tile(
    x,
    w,
    bias,
    row,
    column,
    M,
    N,
    K,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    TMA: tl.constexpr = 0,
    TRANSPOSED: tl.constexpr = False,
):
    """The tile of x w + bias that begins at ``row`` and ``column``, both int64.

    x (M, K), w (K, N) and bias (N,), which may be None, are operands; with TMA, x and w are
    descriptors, that of w one of wᵀ if TRANSPOSED. Products are in the dtype of x.
    """
    o_m = row + tl.arange(0, BLOCK_M)
    o_n = column + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    m_m = o_m[:, None] < M
    m_n = o_n[None, :] < N
    dtype: tl.constexpr = x.dtype if TMA else x.data.dtype.element_ty
    if TMA:
        first_m = row.to(tl.int32)
        first_n = column.to(tl.int32)
    else:
        p_x = at(x, o_m, o_k)
        p_w = at(w, o_k, o_n)
        step_x = tl.cast(x.strides[1], tl.int64) * BLOCK_K
        step_w = tl.cast(w.strides[0], tl.int64) * BLOCK_K
    y = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        if TMA:
            x_tile = x.load([first_m, k])
            w_tile = w.load([first_n, k]).T if TRANSPOSED else w.load([k, first_n])
        else:
            m_k = o_k < K - k
            x_tile = tl.load(p_x, mask=m_m & m_k[None, :], other=0.0)
            w_tile = tl.load(p_w, mask=m_k[:, None] & m_n, other=0.0)
            p_x += step_x
            p_w += step_w
        y = dot(y, x_tile, w_tile.to(dtype), PRECISION)
    return y + columns(bias, o_n, N, 0.0)


@triton.jit
def dot(acc, left, right, PRECISION: tl.constexpr):
    """Adds left · right, of one dtype. Exact fp32 products of a block are summed by themselves.

    They go term by term, and over all of K that chain has up to four times the error of torch's.
    """
    if left.dtype == tl.float32 and PRECISION == "ieee":
        # The compiler makes one dot of a sum and a dot, unless this number is set. It says how many
        # terms fp8 may sum less precisely; fp32 does not look at it.
        block = tl.dot(left, right, input_precision=PRECISION, max_num_imprecise_acc=1)
        return acc + block
    else:
        return tl.dot(left, right, acc, input_precision=PRECISION)


@triton.jit
def dot_wide(acc, narrow, wide, PRECISION: tl.constexpr):
    """Adds narrow · wide, where wide is fp32 and loses nothing; narrow is fp32 or half."""
    if narrow.dtype == tl.float32:
        acc = dot(acc, narrow, wide, PRECISION)
    else:
        high, rest, unit = _split(wide, narrow.dtype)
        acc = tl.dot(narrow, rest, tl.dot(narrow, high, acc / unit)) * unit
    return acc


@triton.jit
def _split(wide, dtype: tl.constexpr):
    """Makes (high, rest, unit) with wide = (high + rest) · unit, the first two of a half dtype.

    ``unit`` is one power of two for each column. It brings any fp32 range into that of fp16; bf16
    has that of fp32 already.
    """
    if dtype == tl.float16:
        # The floor keeps acc / unit finite; what lies so far below it cannot show in fp16.
        peak = tl.maximum(tl.max(tl.abs(wide), 0, keep_dims=True), 1e-12)
        exponent = peak.to(tl.int32, bitcast=True) & 0x7F800000
        unit = exponent.to(tl.float32, bitcast=True) * 2.0**-14
        wide /= unit
    else:
        unit = 1.0
    high = wide.to(dtype)
    return high, (wide - high.to(tl.float32)).to(dtype), unit
