"""``linear``: a plain linear layer, by the GEMM of ``stitch`` where that beats torch's own.

It does on AMD's CPUs, for which MKL was not made. There is no kernel of its own: without a low-rank
part a stitch is a linear layer.
"""

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from snkernels.backends import choose, forced_backend
from snkernels.ops.library import OFFERED, autocast_dtype, device_type
from snkernels.ops.stitch import stitch

OFFERED["linear"] = ("torch", "cpu")

# Multiply-adds from which on it is faster: the call and the packing of the weight cost more than
# torch's, also where only few rows share them.
ENOUGH: Final = 1 << 26


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``F.linear``: y = x Wᵀ + b.

    Args:
        x: tokens, (..., in), of any dtype that F.linear takes.
        weight: W, (out, in).
        bias: (out,) or None.

    Returns:
        y, (..., out), in the dtype of x; under autocast in autocast's dtype. Where the kernel
        computes it, it is differentiable once, and torch.func does not reach through it.

    Raises:
        TypeError, ValueError, RuntimeError: arguments that do not fit together.
    """
    return stitch(x, weight, bias) if _by_kernel(x, weight) else F.linear(x, weight, bias)


def _by_kernel(x: Tensor, weight: Tensor) -> bool:
    device, dtype = device_type(x), x.dtype
    if torch.compiler.is_compiling() or weight.dtype != dtype:
        return False
    if choose("linear", OFFERED["linear"], device, dtype).backend == "torch":
        return False
    if autocast_dtype(device, dtype) != dtype:
        return False
    forced = forced_backend()
    return forced == "cpu" or (forced is None and x.numel() * len(weight) >= ENOUGH)
