"""How far a time is from what the machine allows: ceilings measured here and now, not quoted."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.subject import Work
from benchmarks.timing import gpu_timer, host_timer

_REPEATS = 12


@dataclass(frozen=True)
class Ceilings:
    """Bytes per second of a large copy (read and written) and FLOP/s of a large ``torch.mm``."""

    copy: float
    gemm: float

    def floor(self, work: Work) -> float:
        """Seconds below which the work cannot be done: the slower of its bytes and its FLOPs."""
        return max(work.bytes / self.copy, work.flops / self.gemm)

    def raised(self, other: "Ceilings") -> "Ceilings":
        """The higher of each."""
        return Ceilings(max(self.copy, other.copy), max(self.gemm, other.gemm))


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """The best of some tries each, as a ceiling must be."""
    large, side = (2**30, 8192) if device.type == "cuda" else (2**28, 2048)
    source = torch.zeros(large, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(a)
    return Ceilings(
        copy=2 * large / _best(lambda: target.copy_(source), device),
        gemm=2 * side**3 / _best(lambda: torch.mm(a, b, out=product), device),
    )


def _best(call: Callable[[], object], device: torch.device) -> float:
    sample = gpu_timer(call, 1) if device.type == "cuda" else host_timer(call)
    return min(sample() for _ in range(_REPEATS))
