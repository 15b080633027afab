"""The products that kernels share, also by an operand that is never rounded."""

import triton
import triton.language as tl


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
