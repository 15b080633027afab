"""The static kernel report: every Triton kernel compiled ahead of time, on a machine without a GPU.

``python -m snkernels.kernels.report`` lets the launchers themselves run at the paper's shapes, on
tensors without memory, and compiles what they would launch, with their very configurations. Of
each kernel it tells what can be known without timing it: registers, spilled bytes, shared memory,
tensor-core instructions, wgmma that the assembler serialised, addresses that would overflow, and
how many CTAs fit on an SM. It ends with status 1 where a kernel has one of the :func:`faults`.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from snkernels.kernels.triton import launch, stitch, stitch_layer_norm

MOST_SPILLED_BYTES = 0


@dataclass(frozen=True)
class Chip:
    """What an SM has, in the units of the CUDA programming guide's table of capabilities."""

    shared_per_cta: int
    shared_per_sm: int
    tensor_core: str
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
    80: Chip(163 << 10, 164 << 10, "mma_sync"),
    90: Chip(227 << 10, 228 << 10, "wgmma"),
    100: Chip(227 << 10, 228 << 10, "tcgen05"),
}

# As an x may come: its dtype, and what torch's setting makes of fp32 products.
DTYPES = {
    "bf16": (torch.bfloat16, "ieee"),
    "fp16": (torch.float16, "ieee"),
    "fp32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
}


@dataclass(frozen=True)
class Shape:
    """A stitch: input and output width, and rank (0 for none)."""

    in_features: int
    out_features: int
    rank: int

    def __str__(self) -> str:
        return f"{self.in_features}→{self.out_features} r{self.rank}"


WIDTHS = (384, 768, 1024)
ALL = [
    Shape(*widths, r) for r in (0, 4, 16, 64, 128) for widths in itertools.permutations(WIDTHS, 2)
]
FEW = [Shape(384, 1024, 64), Shape(1024, 384, 64)]
ROWS = 64 * 197


@dataclass
class Build:
    """One compiled kernel, and the shapes that run it."""

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
    serialised: bool
    narrow_addresses: int
    ctas_per_sm: int
    shapes: list[str] = field(default_factory=list)


def faults(build: Build) -> list[str]:
    """What is wrong with a kernel, in words; nothing if it is as it must be."""
    chip = CHIPS[build.arch]
    found = []
    if build.spilled > MOST_SPILLED_BYTES:
        found.append(f"spills {build.spilled} bytes, but may spill {MOST_SPILLED_BYTES}")
    if build.shared > chip.shared_per_cta:
        found.append(f"takes {build.shared} bytes of shared memory of {chip.shared_per_cta}")
    multiplies = "PRECISION" in build.options and build.dtype != "fp32"
    if multiplies and not getattr(build, chip.tensor_core):
        found.append(f"multiplies without {chip.tensor_core}")
    if build.serialised:
        found.append("its wgmma are serialised")
    if build.narrow_addresses:
        found.append(f"computes {build.narrow_addresses} addresses in 32 bits")
    return found


class NoGpu:
    """Stands in for Triton's driver: all that compiling asks of it is a target."""

    def __init__(self, arch: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        self.get_current_device = lambda: arch
        self.get_current_stream = lambda device: 0


def builds(arch: int, dtype: str, shapes: Sequence[Shape]) -> list[Build]:
    """Compiles all that both ops launch, forward and backward, for these shapes of a dtype."""
    found: dict[str, Build] = {}
    label = ""

    def compile_instead(
        kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: Mapping[str, Any]
    ) -> None:
        log = io.StringIO()
        with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
            knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
            compiled = kernel.warmup(*args, grid=grid, **options)
        if compiled.hash not in found:
            found[compiled.hash] = _build(kernel, arch, dtype, options, compiled, log.getvalue())
        if label not in found[compiled.hash].shapes:
            found[compiled.hash].shapes.append(label)

    triton.runtime.driver.set_active(NoGpu(arch))
    torch.backends.cuda.matmul.fp32_precision = DTYPES[dtype][1]
    with launch.launches_go_to(compile_instead):
        for shape in shapes:
            label = str(shape)
            launch_all(shape, DTYPES[dtype][0])
    return list(found.values())


def launch_all(shape: Shape, dtype: torch.dtype, rows: int = ROWS) -> None:
    """Calls both ops, forward and backward with all gradients, on tensors without memory."""

    def tensor(*sizes: int) -> Tensor:
        return torch.empty(sizes, dtype=dtype, device="meta")

    k, n, r = shape.in_features, shape.out_features, shape.rank
    operands: dict[str, Any] = {
        "x": tensor(rows, k),
        "weight": tensor(n, k),
        "bias": tensor(n),
        "lora_A": tensor(r, k) if r else None,
        "lora_B": tensor(n, r) if r else None,
        "scaling": 1.0,
    }
    affine: dict[str, Any] = {"norm_weight": tensor(n), "norm_bias": tensor(n)}
    stitch.stitch_forward(**operands)
    stitch.stitch_backward(tensor(rows, n), **operands, needs=[True] * 5)
    y, normed, mean, rstd = stitch_layer_norm.stitch_layer_norm_forward(
        **operands, **affine, eps=1e-6
    )
    stitch_layer_norm.stitch_layer_norm_backward(
        y, normed, **operands, y=y, mean=mean, rstd=rstd, **affine, needs=[True] * 7
    )


def _build(
    kernel: Any, arch: int, dtype: str, options: Mapping[str, Any], compiled: Any, log: str
) -> Build:
    ptx, ttir = compiled.asm["ptx"], compiled.asm["ttir"]
    registers = int(_found(r"Used (\d+) registers", log))
    shared = compiled.metadata.shared
    return Build(
        kernel=kernel.fn.__name__,
        arch=arch,
        dtype=dtype,
        options=dict(options),
        registers=registers,
        spilled=int(_found(r"(\d+) bytes spill stores", log)),
        shared=shared,
        wgmma=ptx.count("wgmma.mma_async"),
        mma_sync=ptx.count("mma.sync"),
        tcgen05=ptx.count("tcgen05.mma"),
        serialised="C7515" in log,
        narrow_addresses=len(re.findall(r"tt\.addptr .*, (?:tensor<[x\d]*)?i32\b", ttir)),
        ctas_per_sm=CHIPS[arch].ctas_per_sm(compiled.metadata.num_warps, registers, shared),
    )


def _found(pattern: str, log: str) -> str:
    match = re.search(pattern, log)
    if match is None:
        raise RuntimeError(f"the log of ptxas says nothing like {pattern!r}:\n{log}")
    return match[1]


def table(rows: Sequence[Build]) -> str:
    """The report as text, one line for each kernel."""
    titles = "kernel arch dtype M/N/K/… warps stages regs spilled shared wgmma mma tcgen05 CTAs/SM"
    lines = [[*titles.split(), "for"]]
    for b in rows:
        blocks = [f"{k[6:]}{v}" for k, v in b.options.items() if k.startswith("BLOCK_")]
        lines.append(
            [
                b.kernel.strip("_").removesuffix("_kernel"),
                f"sm_{b.arch}",
                b.dtype,
                " ".join(blocks),
                *(str(b.options.get(name, "")) for name in ("num_warps", "num_stages")),
                *(str(n) for n in (b.registers, b.spilled, b.shared)),
                *(str(n) for n in (b.wgmma, b.mma_sync, b.tcgen05, b.ctas_per_sm)),
                b.shapes[0] + (f" and {len(b.shapes) - 1} more" if len(b.shapes) > 1 else ""),
            ]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    padded = (
        "  ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)).rstrip() for line in lines
    )
    return "\n".join(padded)


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints the table and the faults, and returns 1 if there is a fault."""
    parser = argparse.ArgumentParser(prog="python -m snkernels.kernels.report", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--few", action="store_true", help="two shapes in place of the paper's all")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    shapes = FEW if arguments.few else ALL
    tasks = itertools.product(arguments.arch, arguments.dtype, [shapes])
    # A process each: Triton keeps in globals what it compiled before, and says nothing of it again.
    with get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        rows = [build for part in pool.starmap(builds, tasks, chunksize=1) for build in part]
    print(table(rows))
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    bad = [(row, fault) for row in rows for fault in faults(row)]
    for row, fault in bad:
        print(
            f"{row.kernel} for sm_{row.arch}, {row.dtype}, {row.options}: {fault}", file=sys.stderr
        )
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
