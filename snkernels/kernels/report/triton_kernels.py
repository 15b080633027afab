"""The Triton kernels, compiled ahead of time for chips that need not be there."""

import contextlib
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.backends.compiler import GPUTarget

from snkernels.kernels.report.builds import (
    DTYPES,
    GROUPS,
    ROWS,
    TOKENS,
    Build,
    Launch,
    Numbers,
    Shape,
    bounded,
)
from snkernels.kernels.report.chips import CHIPS
from snkernels.kernels.triton import (
    launch,
    multi_stitch,
    multi_stitch_backward,
    residual_layer_norm,
    stitch_layer_norm,
)
from snkernels.kernels.triton.groups import Parameter
from snkernels.kernels.triton.operands import Operand

# Multiply-adds of a launch by its named arguments, twice that in FLOPs; other kernels only move
# bytes. A kernel that multiplies must use the tensor cores, but in exact fp32.
MULTIPLY_ADDS: dict[str, Callable[[Mapping[str, Any]], int]] = {
    "_merge_kernel": lambda a: a["groups"] * a["N"] * a["K"] * (0 if a["a"] is None else a["R"]),
    "_project_groups_kernel": lambda a: a["M"] * a["N"] * a["K"],
    "_outer_kernel": lambda a: a["M"] * a["P"] * a["Q"],
}


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
    return bounded(shape, sizes, moved, 0 if count is None else 2 * count(named), arch, dtype)


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
