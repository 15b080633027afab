"""``linear``: a plain linear layer, by the GEMM of ``stitch`` where that beats torch's own.

It does on AMD's CPUs with AVX-512, for which MKL was not made. There is no kernel of its own:
without a low-rank part a stitch is a linear layer. Whatever was not measured, or is not what it
seems, is left to torch.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from snkernels.backends import choose, forced_backend
from snkernels.kernels import native
from snkernels.ops.library import (
    OFFERED,
    autocast_dtype,
    device_type,
    is_transformed,
    tries_kernel,
)
from snkernels.ops.stitch import stitch

OFFERED["linear"] = ("torch", "cpu")

# Multiply-adds and rows from which on it is faster: the call and the packing of the weight cost
# more than torch's, and few rows share them.
ENOUGH: Final = 1 << 26
ROWS: Final = 128
# More threads than that are too far from the two that it was measured with.
THREADS: Final = 8
_UNBOUNDED: Final = (0, 0)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: y = x Wᵀ + b.

    Args:
        x: tokens, (..., in), of any dtype that F.linear takes.
        weight: W, (out, in).
        bias: (out,) or None.

    Returns:
        y, (..., out), in the dtype of x; under autocast in autocast's dtype. Where the kernel
        computes it, it is differentiable once. Torch computes it in compiled code, under a mode or
        transform of torch (FLOP counters, torch.func), for tensors that are not plain memory of one
        dtype, and where less than the highest precision is asked for. Forcing the "cpu" backend
        lifts only the bounds on size and threads; forcing any other leaves it to torch.

    Raises:
        TypeError, ValueError, RuntimeError: arguments that do not fit together.
    """
    if not torch.is_grad_enabled() and tries_kernel("linear") and (bounds := _bounds()):
        y = native.linear(x, weight, bias, *bounds)
        if y is not None:
            return y
    return stitch(x, weight, bias) if _by_kernel(x, weight, bias) else F.linear(x, weight, bias)


def _bounds() -> tuple[int, int] | None:
    """Multiply-adds and rows from which on the kernel computes a layer; None if it does not."""
    if torch.get_float32_matmul_precision() != "highest":
        return None
    if (forced := forced_backend()) is not None:
        return _UNBOUNDED if forced == "cpu" else None
    return (ENOUGH, ROWS) if torch.get_num_threads() <= THREADS else None


def _by_kernel(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    if is_transformed((x, weight, bias)) or forward_ad._current_level >= 0:
        return False
    device, dtype = device_type(x), x.dtype
    if choose("linear", OFFERED["linear"], device, dtype).backend == "torch":
        return False
    for tensor in (x, weight, bias):
        if tensor is not None and (tensor.layout is not torch.strided or tensor.dtype is not dtype):
            return False
    if x.is_nested or autocast_dtype(device, dtype) is not dtype:
        return False
    if (bounds := _bounds()) is None:
        return False
    if bounds == _UNBOUNDED:
        return True  # whatever the shapes are, for stitch to see
    enough, rows = bounds
    return x.numel() * len(weight) >= enough and x.numel() >= rows * x.shape[-1]
