"""The static kernel report: what is known of every kernel on a machine without a GPU.

``python -m snkernels.kernels.report`` lets the launchers of the Triton kernels run at the paper's
shapes, on tensors without memory, and compiles what they would launch, with their very
configurations; the CUDA kernels it reads from the compiled module, where that has them. Of each it
tells registers, spilled bytes, shared memory, tensor-core and TMA instructions, wgmma that the
assembler serialised, addresses that would overflow, how many CTAs fit on an SM, and the least time
that its bytes and FLOPs take at the ceilings of :data:`CHIPS`. With ``--check`` it ends with status
1 where a kernel has one of the :func:`faults`.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from snkernels.kernels import disassembly, native
from snkernels.kernels.triton import (
    launch,
    multi_stitch,
    multi_stitch_backward,
    residual_layer_norm,
    stitch_layer_norm,
)
from snkernels.kernels.triton.groups import Parameter
from snkernels.kernels.triton.operands import Operand
from snkernels.progress import progress_bar
from snkernels.text import aligned

MOST_SPILLED_BYTES = 0


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


# Multiply-adds of a launch by its named arguments, twice that in FLOPs; other kernels only move
# bytes. A kernel that multiplies must use the tensor cores, but in exact fp32.
MULTIPLY_ADDS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "_merge_kernel": lambda a: a["groups"] * a["N"] * a["K"] * (0 if a["a"] is None else a["R"]),
    "_project_groups_kernel": lambda a: a["M"] * a["N"] * a["K"],
    "_outer_kernel": lambda a: a["M"] * a["P"] * a["Q"],
}

GROUPS = 8


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


class NoGpu:
    """Stands in for Triton's driver: all that compiling asks of it is a target."""

    def __init__(self, arch: int) -> None:
        self.get_current_target = lambda: GPUTarget("cuda", arch, 32)
        self.get_current_device = lambda: arch
        self.get_current_stream = lambda device: 0


def builds(arch: int, dtype: str, shapes: Sequence[Shape]) -> list[Build]:
    """Compiles all that the ops launch, forward and backward, for these shapes of a dtype."""
    found: dict[str, Build] = {}
    label = ""

    def compile_instead(
        kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: Mapping[str, Any]
    ) -> None:
        log = io.StringIO()
        with knobs.nvidia.scope(), knobs.compilation.scope(), contextlib.redirect_stdout(log):
            knobs.nvidia.dump_ptxas_log = knobs.compilation.always_compile = True
            compiled = kernel.warmup(*args, grid=grid, **options)
        launched = _launch(kernel, args, label, arch, dtype)
        if compiled.hash not in found:
            found[compiled.hash] = _build(
                kernel, arch, dtype, options, compiled, log.getvalue(), launched.flops > 0
            )
        if launched not in found[compiled.hash].launches:
            found[compiled.hash].launches.append(launched)

    triton.runtime.driver.set_active(NoGpu(arch))
    torch.backends.cuda.matmul.fp32_precision = DTYPES[dtype].precision
    with launch.launches_go_to(compile_instead):
        for shape in shapes:
            label = str(shape)
            launch_groups(shape, DTYPES[dtype])
        for width in sorted({shape.out_features for shape in shapes}):
            label = str(width)
            launch_norms(width, DTYPES[dtype])
    return sorted(found.values(), key=lambda build: build.kernel)


def launch_groups(
    shape: Shape,
    numbers: Numbers,
    rows: int = ROWS,
    groups: int = GROUPS,
    identity: bool = False,
) -> None:
    """Calls the grouped ops, forward and backward with all gradients, on tensors without memory.

    They get so many groups of that shape, of which the last may do nothing.
    """
    tensors = _parameters(shape, numbers) * groups
    if identity:
        tensors[-len(PARAMETERS) :] = [None] * len(PARAMETERS)
    x, grad = (
        _tensor(numbers.tokens, rows, width) for width in (shape.in_features, shape.out_features)
    )
    operands = x, _tensor(torch.int64, groups + 1), tensors, [1.0] * groups
    for normalize in (False, True):
        y, _, mean, rstd = multi_stitch.multi_stitch_forward(
            *operands, shape.out_features, normalize, 1e-6
        )
        multi_stitch_backward.multi_stitch_backward(
            *(grad, grad if normalize else None, *operands, y, mean, rstd),
            [True, *(tensor is not None for tensor in tensors)],
        )


PARAMETERS = ("weight", "bias", "lora_A", "lora_B", "norm_weight", "norm_bias")


def _parameters(shape: Shape, numbers: Numbers) -> list[Tensor | None]:
    """Of one stitch and the norm behind it, in the order of PARAMETERS."""
    k, n, r = shape.in_features, shape.out_features, shape.rank
    sizes = ((n, k), (n,), (r, k), (n, r), (n,), (n,))
    return [_tensor(numbers.parameters, *size) if 0 not in size else None for size in sizes]


def launch_norms(width: int, numbers: Numbers, rows: int = ROWS) -> None:
    """Calls the ops that normalise rows without groups likewise.

    ``residual_layer_norm`` as in inference and in training, with and without γ and s, and
    ``stitch_layer_norm``, whose products are torch's.
    """
    h = _tensor(numbers.parameters, rows, width)  # under autocast the residual stream stays fp32
    branch = _tensor(numbers.tokens, rows, width)
    vector = _tensor(numbers.parameters, width)
    each = _tensor(torch.float32, -(-rows // TOKENS))
    for layer_scale, drop_path, gradients in (
        (None, None, [True, True, False, True, True]),
        (vector, each, [True] * 5),
    ):
        operands = h, branch, layer_scale, drop_path
        total, normed, mean, rstd = residual_layer_norm.residual_layer_norm_forward(
            *operands, vector, vector, 1e-6, numbers.tokens
        )
        residual_layer_norm.residual_layer_norm_backward(
            total, normed, *operands, total, mean, rstd, vector, vector, gradients
        )
    weight = _tensor(numbers.parameters, width, width)
    stitch: dict[str, Any] = {"x": branch, "weight": weight, "bias": vector, "scaling": 1.0}
    stitch |= {"lora_A": None, "lora_B": None, "norm_weight": vector, "norm_bias": vector}
    y, normed, mean, rstd = stitch_layer_norm.stitch_layer_norm_forward(**stitch, eps=1e-6)
    stitch_layer_norm.stitch_layer_norm_backward(
        y, normed, **stitch, y=y, mean=mean, rstd=rstd, needs=[True] * 3 + [False] * 2 + [True] * 2
    )


def _tensor(dtype: torch.dtype, *sizes: int) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device="meta")


def _launch(kernel: Any, args: Sequence[Any], shape: str, arch: int, dtype: str) -> Launch:
    """What one launch must move and compute, from its arguments."""
    name, named = kernel.fn.__name__, dict(zip(kernel.arg_names, args, strict=False))
    moved = sum(_bytes(value, named.get("groups", 1)) for value in args)
    count = MULTIPLY_ADDS.get(name)
    sizes = {key: n for key, n in named.items() if key in ("M", "N", "K", "R", "P", "Q", "groups")}
    return _bounded(shape, sizes, moved, 0 if count is None else 2 * count(named), arch, dtype)


def _bounded(
    shape: str, sizes: dict[str, int], moved: int, flops: int, arch: int, dtype: str
) -> Launch:
    chip = CHIPS[arch]
    times = {
        "bytes": moved / chip.bandwidth,
        "FLOPs": flops / chip.flops[DTYPES[dtype].products],
    }
    bound = max(times, key=lambda kind: times[kind])
    return Launch(shape, sizes, moved, flops, round(times[bound] * 1e6, 2), bound)


def _bytes(argument: Any, groups: int) -> int:
    """What an argument of a launch holds in memory; of a parameter each group has one."""
    match argument:
        case Tensor():
            return argument.numel() * argument.itemsize
        case Operand(data=data):
            return _bytes(data, groups)
        case Parameter(one=one, table=table):
            return groups * _bytes(one, groups) + _bytes(table, groups)
    return 0


def _build(
    kernel: Any,
    arch: int,
    dtype: str,
    options: Mapping[str, Any],
    compiled: Any,
    log: str,
    multiplies: bool,
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
        tma=ptx.count("cp.async.bulk.tensor"),
        serialised="C7515" in log,
        narrow_addresses=len(re.findall(r"tt\.addptr .*, (?:tensor<[x\d]*)?i32\b", ttir)),
        ctas_per_sm=CHIPS[arch].ctas_per_sm(compiled.metadata.num_warps, registers, shared),
        multiplies=multiplies,
    )


def _found(pattern: str, log: str) -> str:
    match = re.search(pattern, log)
    if match is None:
        raise RuntimeError(f"the log of ptxas says nothing like {pattern!r}:\n{log}")
    return match[1]


# The kernels of the compiled module.
_SM90, _MERGE = "stitch_layer_norm_sm90_kernel", "merge_kernel"
# What stands for half-precision dtypes in mangled names.
_MANGLED = {"13__nv_bfloat16": "bf16", "6__half": "fp16"}


def cuda_builds(arches: Iterable[int], shapes: Sequence[Shape]) -> list[Build]:
    """Those CUDA kernels of the compiled module that were built for these architectures.

    Their launches are those for these shapes; local memory counts as spilled.
    """
    resources = disassembly.resources()
    found = []
    for name, code in disassembly.instructions().items():
        architecture, mangled = name.split()
        arch, used = int(re.findall(r"\d+", architecture)[0]), resources[name]
        if arch not in arches:
            continue
        kernel, arguments = _demangled(mangled)
        part, dtype = next(item for item in _MANGLED.items() if item[0] in mangled)
        shared, launches = used.shared, []
        if kernel == _SM90:
            width, slots = arguments
            run = [(s, own) for s, own in _that_run(slots > 1, shapes) if own[0] == width]
            # What it asks for at launch depends on the shape.
            shared += max((own[3] for _, own in run), default=0)
            groups = GROUPS if slots > 1 else 1
            launches = _stitch_launches([shape for shape, _ in run], groups, arch, dtype)
        elif kernel == _MERGE:
            # Weights of fp32 beside tokens in half precision, or both alike.
            dtype += "/fp32" if f"{part}fE" in mangled else ""
            launches = _merge_launches(arch, dtype, shapes)
        wgmma = code.count("HGMMA")
        found.append(
            Build(
                kernel=kernel,
                arch=arch,
                dtype=dtype,
                options={"template": arguments, "num_warps": used.threads // 32},
                registers=used.registers,
                spilled=used.stack,
                shared=shared,
                wgmma=wgmma,
                mma_sync=len(re.findall(r"\bHMMA", code)),
                tcgen05=code.count("UTCHMMA"),
                tma=code.count("UTMALDG") + code.count("UTMASTG"),
                # Serialised, each product is waited for by itself.
                serialised=0 < wgmma == code.count("WARPGROUP.DEPBAR"),
                narrow_addresses=0,
                ctas_per_sm=CHIPS[arch].ctas_per_sm(used.threads // 32, used.registers, shared),
                # The merge multiplies by mma.sync on every chip: bytes bound it.
                multiplies=kernel == _SM90,
                launches=launches,
            )
        )
    return found


def _that_run(
    grouped: bool, shapes: Sequence[Shape]
) -> list[tuple[Shape, tuple[int, int, int, int]]]:
    """The shapes that the Hopper kernel takes, with (width, slices, stages, bytes) of each."""
    chosen = (
        (shape, native._C.cuda_sm90_kernel_for(shape.in_features, shape.out_features, grouped))
        for shape in shapes
    )
    return [(shape, own) for shape, own in chosen if own is not None]


def _stitch_launches(shapes: Sequence[Shape], groups: int, arch: int, dtype: str) -> list[Launch]:
    """Those of the Hopper kernel, whatever the rank: W' holds the low-rank part."""
    tokens = DTYPES[dtype].tokens
    found: list[Launch] = []
    for shape in shapes:
        k, n = shape.in_features, shape.out_features
        parameters = _tensor(tokens, groups, n, k), _tensor(tokens, groups, 3, n)
        outputs = _tensor(tokens, 2, ROWS, n), _tensor(torch.float32, 2, ROWS)
        moved = sum(_bytes(t, 1) for t in (_tensor(tokens, ROWS, k), *parameters, *outputs))
        sizes = {"M": ROWS, "N": n, "K": k, "groups": groups}
        launched = _bounded(f"{k}→{n}", sizes, moved, 2 * ROWS * n * k, arch, dtype)
        if launched not in found:
            found.append(launched)
    return found


def _merge_launches(arch: int, dtype: str, shapes: Sequence[Shape]) -> list[Launch]:
    """Those before the Hopper kernel's, for one stitch and for groups of them."""
    tokens, parameters, _ = DTYPES[dtype]
    found: list[Launch] = []
    for grouped in (False, True):
        for shape, _ in _that_run(grouped, shapes):
            k, n, r = shape.in_features, shape.out_features, shape.rank
            if r == 0 and tokens == parameters:
                continue  # W is W'
            groups = GROUPS if grouped else 1
            read = groups * (n * k + r * (n + k)) * parameters.itemsize
            sizes = {"N": n, "K": k, "R": r, "groups": groups}
            moved, flops = read + groups * n * k * tokens.itemsize, 2 * groups * n * k * r
            found.append(_bounded(str(shape), sizes, moved, flops, arch, dtype))
    return found


def _demangled(mangled: str) -> tuple[str, list[int]]:
    """A kernel's name, without its namespaces, and the integers among its template arguments."""
    at, name = 0, mangled
    while length := re.search(r"\d+", mangled[at:]):  # identifiers come after their lengths
        start = at + length.end()
        at = start + int(length[0])
        if mangled[start:at].endswith("_kernel"):
            name = mangled[start:at]
            break
    return name, [int(number) for number in re.findall(r"L[ijlm](\d+)E", mangled[at:])]


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
        parts = pool.imap(_builds, tasks)
        rows = [build for _ in progress_bar(tasks, "compiling") for build in next(parts)]
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
    bad = [(row, fault) for row in rows for fault in faults(row)]
    for row, fault in bad:
        print(
            f"{row.kernel} for sm_{row.arch}, {row.dtype}, {row.options}: {fault}", file=sys.stderr
        )
    return 1 if bad and arguments.check else 0


def _builds(task: tuple[int, str, Sequence[Shape]]) -> list[Build]:
    return builds(*task)


if __name__ == "__main__":
    sys.exit(main())
