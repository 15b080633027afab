"""What the chips have that kernels are compiled for."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Chip:
    """What an SM has, in the units of the CUDA programming guide's table of capabilities.

    The ceilings, bytes/s of device memory and FLOP/s, dense, by the kind of products, are those of
    the data sheet of the fastest card: what is measured stays below them.
    """

    card: str
    shared_per_cta: int
    shared_per_sm: int
    tensor_core: str
    bandwidth: float
    flops: dict[str, float]
    registers: int = 65536
    warps: int = 64
    ctas: int = 32

    def ctas_per_sm(self, warps: int, registers: int, shared: int) -> int:
        """How many CTAs of so many warps, registers per thread and shared bytes run at once."""
        per_warp = -(-registers * 32 // 256) * 256
        return min(
            self.ctas,
            self.warps // warps,
            self.registers // (per_warp * warps),
            self.shared_per_sm // (shared + 1024),  # 1 KiB of each CTA's is the system's
        )


CHIPS = {
    80: Chip(
        "A100 80 GB SXM",
        163 << 10,
        164 << 10,
        "mma_sync",
        2.04e12,
        {"half": 312e12, "tf32": 156e12, "fp32": 19.5e12},
    ),
    90: Chip(
        "H100 SXM",
        227 << 10,
        228 << 10,
        "wgmma",
        3.35e12,
        {"half": 989e12, "tf32": 495e12, "fp32": 67e12},
    ),
    100: Chip(
        "B200",
        227 << 10,
        228 << 10,
        "tcgen05",
        8e12,
        {"half": 2250e12, "tf32": 1125e12, "fp32": 75e12},
    ),
}
