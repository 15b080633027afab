"""The products that kernels share: projected tiles, and an operand that is never rounded."""

import triton
import triton.language as tl


@triton.jit
def project_tiles(
    p_x,
    p_w,
    p_bias,
    p_low,
    p_b,
    o_m,
    o_n,
    M,
    N,
    K,
    R,
    stride_xm,
    stride_xk,
    stride_wn,
    stride_wk,
    stride_bias,
    stride_low,
    stride_bn,
    stride_br,
    PRECISION: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
    TILES: tl.constexpr,
):
    """Rows ``o_m`` of x wᵀ + low bᵀ + bias, a tuple of TILES tiles of columns from ``o_n`` on.

    Products are in the dtype of x. ``low`` is (M, R) in fp32, with adjacent columns.
    """
    BLOCK_N: tl.constexpr = o_n.shape[0]
    o_k = tl.arange(0, BLOCK_K).to(tl.int64)
    m_m = o_m[:, None] < M
    p_x += o_m[:, None] * stride_xm + o_k[None, :] * stride_xk
    p_w += o_n[None, :] * stride_wn + o_k[:, None] * stride_wk
    step_x = tl.cast(stride_xk, tl.int64) * BLOCK_K
    step_w = tl.cast(stride_wk, tl.int64) * BLOCK_K
    tile_w = tl.cast(stride_wn, tl.int64) * BLOCK_N
    tiles = ()
    for _ in tl.static_range(TILES):
        tiles += (tl.zeros([o_m.shape[0], BLOCK_N], tl.float32),)
    for k in range(0, K, BLOCK_K):
        m_k = o_k < K - k
        x = tl.load(p_x, mask=m_m & m_k[None, :], other=0.0)
        sums = ()
        for i in tl.static_range(TILES):
            m_w = m_k[:, None] & (o_n[None, :] < N - i * BLOCK_N)
            w = tl.load(p_w + i * tile_w, mask=m_w, other=0.0).to(x.dtype)
            sums += (tl.dot(x, w, tiles[i], input_precision=PRECISION),)
        tiles = sums
        p_x += step_x
        p_w += step_w

    if p_low is not None:
        o_r = tl.arange(0, BLOCK_R).to(tl.int64)
        p_low += o_m[:, None] * stride_low + o_r[None, :]
        p_b += o_n[None, :] * stride_bn + o_r[:, None] * stride_br
        step_b = tl.cast(stride_br, tl.int64) * BLOCK_R
        tile_b = tl.cast(stride_bn, tl.int64) * BLOCK_N
        for r in range(0, R, BLOCK_R):
            m_r = o_r < R - r
            low = tl.load(p_low, mask=m_m & m_r[None, :], other=0.0)
            sums = ()
            for i in tl.static_range(TILES):
                m_b = m_r[:, None] & (o_n[None, :] < N - i * BLOCK_N)
                b = tl.load(p_b + i * tile_b, mask=m_b, other=0.0).to(p_x.dtype.element_ty)
                sums += (dot_wide_left(tiles[i], low, b, PRECISION),)
            tiles = sums
            p_low += tl.cast(BLOCK_R, tl.int64)
            p_b += step_b

    if p_bias is not None:
        sums = ()
        for i in tl.static_range(TILES):
            o_bias = o_n + i * BLOCK_N
            bias = tl.load(p_bias + o_bias * stride_bias, mask=o_bias < N, other=0.0)
            sums += (tiles[i] + bias.to(tl.float32)[None, :],)
        tiles = sums
    return tiles


@triton.jit
def outer_tile(
    p_left,
    p_right,
    p_out,
    start,
    end,
    P,
    Q,
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
    """Stores the tile program_id(0) of leftᵀ right over rows ``start`` to ``end``, both int64.

    Products are in the dtype of left.
    """
    blocks_q = tl.cdiv(Q, BLOCK_Q)
    pid = tl.program_id(0)
    o_m = start + tl.arange(0, BLOCK_M)
    o_p = (pid // blocks_q).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    o_q = (pid % blocks_q).to(tl.int64) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    m_p = o_p < P
    m_q = o_q < Q
    p_left += o_p[:, None] * stride_lp + o_m[None, :] * stride_lm
    p_right += o_m[:, None] * stride_rm + o_q[None, :] * stride_rq
    step_left = tl.cast(stride_lm, tl.int64) * BLOCK_M
    step_right = tl.cast(stride_rm, tl.int64) * BLOCK_M

    acc = tl.zeros([BLOCK_P, BLOCK_Q], tl.float32)
    for m in range(0, (end - start).to(tl.int32), BLOCK_M):
        m_m = o_m < end - m
        left = tl.load(p_left, mask=m_p[:, None] & m_m[None, :], other=0.0)
        right = tl.load(p_right, mask=m_m[:, None] & m_q[None, :], other=0.0)
        if right.dtype == tl.float32:
            acc = dot_wide_right(acc, left, right, PRECISION)
        else:
            acc = tl.dot(left, right.to(left.dtype), acc, input_precision=PRECISION)
        p_left += step_left
        p_right += step_right
    p_out += o_p[:, None] * stride_op + o_q[None, :] * stride_oq
    tl.store(p_out, acc, mask=m_p[:, None] & m_q[None, :])


@triton.jit
def dot_wide_left(acc, wide, narrow, PRECISION: tl.constexpr):
    """Adds wide · narrow, where wide is fp32 and loses nothing; narrow is fp32 or half."""
    if narrow.dtype == tl.float32:
        acc = tl.dot(wide, narrow, acc, input_precision=PRECISION)
    else:
        high, rest, unit = _split(wide, 1, narrow.dtype)
        acc = tl.dot(rest, narrow, tl.dot(high, narrow, acc / unit)) * unit
    return acc


@triton.jit
def dot_wide_right(acc, narrow, wide, PRECISION: tl.constexpr):
    """Adds narrow · wide, as :func:`dot_wide_left` does."""
    if narrow.dtype == tl.float32:
        acc = tl.dot(narrow, wide, acc, input_precision=PRECISION)
    else:
        high, rest, unit = _split(wide, 0, narrow.dtype)
        acc = tl.dot(narrow, rest, tl.dot(narrow, high, acc / unit)) * unit
    return acc


@triton.jit
def _split(wide, axis: tl.constexpr, dtype: tl.constexpr):
    """Makes (high, rest, unit) with wide = (high + rest) · unit, the first two of a half dtype.

    ``unit`` is one power of two for each line along the contracted axis. It brings any fp32 range
    into that of fp16; bf16 has that of fp32 already.
    """
    if dtype == tl.float16:
        # The floor keeps acc / unit finite; what lies so far below it cannot show in fp16.
        peak = tl.maximum(tl.max(tl.abs(wide), axis, keep_dims=True), 1e-12)
        exponent = peak.to(tl.int32, bitcast=True) & 0x7F800000
        unit = exponent.to(tl.float32, bitcast=True) * 2.0**-14
        wide /= unit
    else:
        unit = 1.0
    high = wide.to(dtype)
    return high, (wide - high.to(tl.float32)).to(dtype), unit
