"""The static kernel report: what is known of every kernel on a machine without a GPU.

``python -m snkernels.kernels.report`` lets the launchers of the Triton kernels run at the paper's
shapes, on tensors without memory, and compiles what they would launch, with their very
configurations; the CUDA kernels it reads from the compiled module, where that has them. Of each it
tells registers, spilled bytes, shared memory, tensor-core and TMA instructions, wgmma that the
assembler serialised, addresses that would overflow, how many CTAs fit on an SM, and the least time
that its bytes and FLOPs take at the ceilings of :data:`CHIPS`. With ``--check`` it ends with status
1 where a kernel has one of the :func:`faults`, or the CUDA kernels could not be looked at because
the compiled module did not import.
"""

import argparse
import itertools
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path

from triton import knobs

from snkernels.kernels import native
from snkernels.kernels.report import disassembly
from snkernels.kernels.report.builds import ALL, DTYPES, FEW, Build, faults
from snkernels.kernels.report.chips import CHIPS
from snkernels.kernels.report.cuda_kernels import cuda_builds
from snkernels.kernels.report.triton_kernels import builds
from snkernels.progress import progress_bar
from snkernels.text import aligned


def table(rows: Sequence[Build]) -> str:
    """The report as text, one line for each kernel and the launch of it that takes longest."""
    titles = (
        "kernel arch dtype M/N/K/… warps stages regs spilled shared wgmma mma tcgen05 TMA CTAs/SM"
    )
    lines = [[*titles.split(), "longest launch", "MB", "GFLOP", "floor", "for"]]
    for b in rows:
        blocks = [f"{k[6:]}{v}" for k, v in b.options.items() if k.startswith("BLOCK_")]
        blocks += [str(n) for n in b.options.get("template", ())]
        lines.append(
            [
                b.kernel.strip("_").removesuffix("_kernel"),
                f"sm_{b.arch}",
                b.dtype,
                " ".join(blocks),
                *(str(b.options.get(name, "")) for name in ("num_warps", "num_stages")),
                *(str(n) for n in (b.registers, b.spilled, b.shared)),
                *(str(n) for n in (b.wgmma, b.mma_sync, b.tcgen05, b.tma, b.ctas_per_sm)),
                *_longest(b),
            ]
        )
    return aligned(lines)


def _longest(build: Build) -> tuple[str, ...]:
    if not build.launches:
        return ("",) * 5
    top = max(build.launches, key=lambda launched: launched.floor_us)
    shapes = {launched.shape for launched in build.launches}
    return (
        " ".join(f"{name}{size}" for name, size in top.sizes.items()),
        f"{top.bytes / 1e6:.1f}",
        f"{top.flops / 1e9:.1f}",
        f"{top.floor_us:.1f} µs ({top.bound})",
        top.shape + (f" and {len(shapes) - 1} more" if len(shapes) > 1 else ""),
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Compiles, prints the table and the faults; with --check, returns 1 if there is a fault."""
    parser = argparse.ArgumentParser(
        prog="python -m snkernels.kernels.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--arch", type=int, nargs="+", choices=CHIPS, default=list(CHIPS))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--few", action="store_true", help="two shapes in place of the paper's all")
    parser.add_argument("--no-cuda", action="store_true", help="leave out the CUDA kernels")
    parser.add_argument("--json", type=Path, help="where to write all figures")
    parser.add_argument(
        "--check", action="store_true", help="end with status 1 if there is a fault"
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    arguments = parser.parse_args(argv)
    if knobs.runtime.interpret:
        parser.error("the interpreter compiles nothing: unset TRITON_INTERPRET")
    shapes = FEW if arguments.few else ALL
    tasks = list(itertools.product(arguments.arch, arguments.dtype, [shapes]))
    # A process each: Triton keeps in globals what it compiled before, and says nothing of it again.
    with get_context("spawn").Pool(arguments.jobs, maxtasksperchild=1) as pool:
        parts = [pool.apply_async(builds, task) for task in tasks]
        rows = [build for part in progress_bar(parts, "compiling") for build in part.get()]
    note = "left out" if arguments.no_cuda else disassembly.obstacle()
    if note is None:
        rows += cuda_builds(arguments.arch, shapes)
    print(table(rows))
    for arch in arguments.arch:
        chip = CHIPS[arch]
        rates = ", ".join(f"{flops / 1e12:g} {kind}" for kind, flops in chip.flops.items())
        print(
            f"floors on sm_{arch}: {chip.card}, {chip.bandwidth / 1e12:g} TB/s; TFLOP/s: {rates} "
            "(data sheet)"
        )
    if note is not None:
        print(f"no CUDA kernels: {note}")
    if arguments.json:
        arguments.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    bad = [
        f"{row.kernel} for sm_{row.arch}, {row.dtype}, {row.options}: {fault}"
        for row in rows
        for fault in faults(row)
    ]
    if native.IMPORT_ERROR is not None and not arguments.no_cuda:
        bad.append(f"the CUDA kernels, if there are any, were not seen: {native.IMPORT_ERROR}")
    for fault in bad:
        print(fault, file=sys.stderr)
    return 1 if bad and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
