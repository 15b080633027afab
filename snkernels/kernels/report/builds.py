"""What is told of compiled kernels and their launches, at which shapes and dtypes; faults."""

import itertools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from snkernels.kernels.report.chips import CHIPS

MOST_SPILLED_BYTES = 0


class Numbers(NamedTuple):
    """Dtypes of the tokens and of the parameters, and what torch's setting makes of fp32."""

    tokens: torch.dtype
    parameters: torch.dtype
    precision: str = "ieee"

    @property
    def products(self) -> str:
        """What multiplies them: a key of :attr:`Chip.flops`."""
        if self.tokens.itemsize == 2:
            return "half"
        return "tf32" if self.precision == "tf32" else "fp32"


DTYPES = {
    "bf16": Numbers(torch.bfloat16, torch.bfloat16),
    "fp16": Numbers(torch.float16, torch.float16),
    "fp32": Numbers(torch.float32, torch.float32),
    "tf32": Numbers(torch.float32, torch.float32, "tf32"),
    # Under autocast: the weights are those of an fp32 model.
    "bf16/fp32": Numbers(torch.bfloat16, torch.float32),
    "fp16/fp32": Numbers(torch.float16, torch.float32),
}


@dataclass(frozen=True)
class Shape:
    """A stitch: input and output width, and rank (0 for none)."""

    in_features: int
    out_features: int
    rank: int

    def __str__(self) -> str:
        return f"{self.in_features}→{self.out_features} r{self.rank}"


PAPER = (384, 768, 1024)
ALL = [
    *(
        Shape(*widths, r)
        for r in (0, 4, 16, 64, 128)
        for widths in itertools.permutations(PAPER, 2)
    ),
    Shape(192, 1280, 64),
    Shape(1280, 192, 64),
]
FEW = [Shape(384, 1024, 64), Shape(1024, 384, 64)]
ROWS = 64 * 197
TOKENS = 197
GROUPS = 8


@dataclass
class Launch:
    """One launch of a kernel, and what bounds it: each input read, each output written once."""

    shape: str
    sizes: dict[str, int]
    bytes: int
    flops: int
    floor_us: float
    bound: str


@dataclass
class Build:
    """One compiled kernel, and the launches that run it."""

    kernel: str
    arch: int
    dtype: str
    options: dict[str, Any]
    registers: int
    spilled: int
    shared: int
    wgmma: int
    mma_sync: int
    tcgen05: int
    tma: int
    serialised: bool
    narrow_addresses: int
    ctas_per_sm: int
    multiplies: bool
    launches: list[Launch] = field(default_factory=list)


def bounded(
    shape: str, sizes: dict[str, int], moved: int, flops: int, arch: int, dtype: str
) -> Launch:
    """A launch that moves so many bytes and computes so much: what bounds it, and how long."""
    chip = CHIPS[arch]
    times = {
        "bytes": moved / chip.bandwidth,
        "FLOPs": flops / chip.flops[DTYPES[dtype].products],
    }
    bound = max(times, key=lambda kind: times[kind])
    return Launch(shape, sizes, moved, flops, round(times[bound] * 1e6, 2), bound)


def faults(build: Build) -> list[str]:
    """What is wrong with a kernel, in words; nothing if it is as it must be."""
    chip = CHIPS[build.arch]
    found = []
    if build.spilled > MOST_SPILLED_BYTES:
        found.append(f"spills {build.spilled} bytes, but may spill {MOST_SPILLED_BYTES}")
    if build.shared > chip.shared_per_cta:
        found.append(f"takes {build.shared} bytes of shared memory of {chip.shared_per_cta}")
    if build.multiplies and build.dtype != "fp32" and not getattr(build, chip.tensor_core):
        found.append(f"multiplies without {chip.tensor_core}")
    if build.serialised:
        found.append("its wgmma are serialised")
    if build.narrow_addresses:
        found.append(f"computes {build.narrow_addresses} addresses in 32 bits")
    return found
