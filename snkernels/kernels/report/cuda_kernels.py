"""The CUDA kernels, read from the compiled module."""

import re
from collections.abc import Iterable, Sequence

from snkernels.kernels import native
from snkernels.kernels.report import disassembly
from snkernels.kernels.report.builds import (
    DTYPES,
    GROUPS,
    ROWS,
    Build,
    Launch,
    Shape,
    bounded,
)
from snkernels.kernels.report.chips import CHIPS

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
        parameters, statistics = groups * (n * k + 3 * n), 2 * ROWS * 4
        moved = (ROWS * (k + 2 * n) + parameters) * tokens.itemsize + statistics
        sizes = {"M": ROWS, "N": n, "K": k, "groups": groups}
        launched = bounded(f"{k}→{n}", sizes, moved, 2 * ROWS * n * k, arch, dtype)
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
            found.append(bounded(str(shape), sizes, moved, flops, arch, dtype))
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
