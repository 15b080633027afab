"""Which implementation of an op runs: chosen per op, device and dtype, or forced by the user.

A kernel is chosen by itself only where a committed record shows that its tests passed and that it
won on that kind of device (``PROVEN``). Everywhere else the ``torch`` backend runs and the kernels
wait to be asked for, by ``SNKERNELS_BACKEND`` or :func:`use_backend`.
"""

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from snkernels.kernels import native

BACKENDS = ("torch", "cpu", "triton", "cuda")

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

# (op, device type) -> (backend, the record that shows it); the backward goes with its op.
PROVEN: dict[tuple[str, str], tuple[str, str]] = {
    (op, "cpu"): ("cpu", "benchmarks/results/cpu.md")
    for op in ("multi_stitch", "residual_layer_norm", "stitch", "stitch_layer_norm")
}
if native.AMD_WITH_AVX512:
    PROVEN["linear", "cpu"] = PROVEN["stitch", "cpu"]


# What those records were made with; nothing is proven of another dtype.
RECORDED_DTYPES = {"cpu": (torch.float32,)}


@dataclass(frozen=True)
class Choice:
    """A backend, and why it was chosen."""

    backend: str
    reason: str


def _validated(backend: str, source: str) -> str:
    if backend not in BACKENDS:
        raise ValueError(f"{source} must be one of {', '.join(BACKENDS)}, but it is {backend!r}")
    return backend


_environment = os.environ.get("SNKERNELS_BACKEND") or None
_forced: str | None = _environment and _validated(_environment, "SNKERNELS_BACKEND")


def forced_backend() -> str | None:
    """The backend that the user forced, or None."""
    return _forced


@contextlib.contextmanager
def use_backend(backend: str | None) -> Iterator[None]:
    """Forces a backend inside the ``with`` block for all ops that have it; None forces none.

    It holds for the whole process, as backward passes run on threads of their own. An op whose
    kernel cannot run here raises when called. One without such a kernel runs as it would otherwise,
    but under "cuda" by its Triton kernel if that can run: it is what kernels of "cuda" themselves
    leave the rest to.

    Raises:
        ValueError: an unknown backend.
    """
    previous = _forced
    _force(backend and _validated(backend, "backend"))
    try:
        yield
    finally:
        _force(previous)


def _force(backend: str | None) -> None:
    global _forced
    _forced = backend
    forget_choices()


def forget_choices() -> None:
    """Makes the next calls choose anew, by what ``PROVEN`` and the environment say then."""
    choose.cache_clear()
    cpu_kernel_is_chosen.cache_clear()


def obstacle(backend: str, device: str, dtype: torch.dtype) -> str | None:
    """Why ``backend`` cannot run on this device type and dtype here; None if it can."""
    if backend == "torch":
        return None
    if dtype not in KERNEL_DTYPES:
        names = ", ".join(str(d).removeprefix("torch.") for d in KERNEL_DTYPES)
        return f"its kernels take {names}, not {str(dtype).removeprefix('torch.')}"
    if backend == "triton":
        if importlib.util.find_spec("triton") is None:
            return "triton is not installed"
        if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
            return f"it runs on {device} only under TRITON_INTERPRET=1"
        return None
    if native.IMPORT_ERROR is not None:
        return f"the compiled module did not import: {native.IMPORT_ERROR}"
    if backend == "cuda" and native.CUDA_VERSION is None:
        return "the compiled module was built without CUDA"
    if backend == "cuda" and importlib.util.find_spec("triton") is None:
        return (
            "triton is not installed, which computes gradients, and what the chip has no room for"
        )
    if backend != device:
        return f"it runs on {backend} tensors, not on {device}"
    return None


@functools.cache
def choose(op: str, offered: tuple[str, ...], device: str, dtype: torch.dtype) -> Choice:
    """The backend for an op that offers some, on a device type and for the dtype of x.

    Raises:
        RuntimeError: a forced backend that has the op but cannot run here.
    """
    if _forced in offered:
        if reason := obstacle(_forced, device, dtype):
            raise RuntimeError(f"backend {_forced!r} is forced, but cannot run {op}: {reason}")
        return Choice(_forced, "forced")
    if _forced == "cuda" and "triton" in offered and not obstacle("triton", device, dtype):
        return Choice("triton", "cuda is forced, of which the op has no kernel")
    family = op.removesuffix("_backward")
    if (family, device) not in PROVEN:
        return Choice("torch", f"no record shows a faster kernel on {device} yet")
    backend, record = PROVEN[family, device]
    if reason := obstacle(backend, device, dtype):
        return Choice("torch", f"{backend} would be faster, but {reason}")
    if dtype not in RECORDED_DTYPES[device]:
        name = str(dtype).removeprefix("torch.")
        return Choice("torch", f"no record shows a faster kernel for {name} on {device} yet")
    return Choice(backend, f"faster than torch on {device} by {record}")


@functools.cache
def cpu_kernel_is_chosen(op: str, offered: tuple[str, ...]) -> bool:
    """Whether fp32 tensors in CPU memory go to the compiled kernel.

    Unlike :func:`choose` it does not raise: the tensors of the call may be others.
    """
    if _forced not in (None, "cpu") or obstacle("cpu", "cpu", torch.float32):
        return False
    return choose(op, offered, "cpu", torch.float32).backend == "cpu"
