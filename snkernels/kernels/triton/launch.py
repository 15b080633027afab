"""How every Triton kernel is launched, and what launchers share."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

Runner = Callable[[Any, tuple[int, ...], Sequence[Any], Mapping[str, Any]], None]


def _run(
    kernel: Any, grid: tuple[int, ...], args: Sequence[Any], options: Mapping[str, Any]
) -> None:
    device = next(arg.device for arg in args if hasattr(arg, "device"))
    # Triton launches on the current device, which need not be that of the tensors.
    with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
        kernel[grid](*args, **options)


_runner: Runner = _run


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Launches on the device of the first tensor among ``args``, on torch's current stream.

    ``options`` are the kernel's constants and what the compiler takes.
    """
    # Triton's own default for fusion is about to change: the same bits from every version.
    _runner(kernel, grid, args, {"enable_fp_fusion": True, **options})


@contextlib.contextmanager
def launches_go_to(runner: Runner) -> Iterator[None]:
    """Hands every launch inside the ``with`` block to ``runner``, to record it or to compile it."""
    global _runner
    previous, _runner = _runner, runner
    try:
        yield
    finally:
        _runner = previous


def dot_precision(dtype: torch.dtype) -> str:
    """What ``tl.dot`` does with operands of ``dtype``: for fp32, what torch's own setting says."""
    if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32":
        return "tf32"
    return "ieee"
