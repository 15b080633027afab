"""How an op enters torch: schema, fake, and the backends behind it.

Ops are defined with ``torch.library.Library``, a third of the call cost of the decorator, and each
has a thin ``torch.autograd.Function`` on top. Inside, an op is opaque to torch.compile.
"""

import functools
import importlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, compiler
from torch._C._autograd import _profiler_enabled

from snkernels import backends
from snkernels.kernels.watchers import TRANSFORMS

_library = torch.library.Library("snkernels", "DEF")

# op -> the backends it has, best known first; ``snkernels info`` reads it.
OFFERED: dict[str, tuple[str, ...]] = {}


def register(
    schema: str,
    *,
    fake: Callable[..., Any],
    implementations: dict[str, Callable[..., Any]],
    check: Callable[..., None] | None = None,
) -> Callable[..., Any]:
    """Defines ``snkernels::<schema>``, which runs the implementation of the chosen backend.

    Every implementation takes the schema's arguments. The dtype that decides is that of ``x``. What
    comes by way of torch, from compiled code or from whoever calls the op itself, nobody has looked
    at: ``check`` does, where an implementation would follow wrong arguments anywhere.

    Returns:
        The op, to be called with all of its arguments, in order. It goes past torch's dispatcher,
        which takes 8 µs, where nobody in between would do anything; with ``plain=True`` it does not
        look whether that is so.
    """
    name = schema.split("(", 1)[0]
    offered = OFFERED[name] = tuple(implementations)
    position = [a.name for a in torch._C.parse_schema(f"snkernels::{schema}").arguments].index("x")

    def run(*args: Any) -> Any:
        x: Tensor = args[position]
        choice = backends.choose(name, offered, device_type(x), x.dtype)
        return implementations[choice.backend](*args)

    def checked(*args: Any) -> Any:
        if check is not None:
            check(*args)
        return run(*args)

    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, checked, key)
    torch.library.register_fake(f"snkernels::{name}", fake, lib=_library)
    dispatched = getattr(torch.ops.snkernels, name).default

    def call(*args: Any, plain: bool = False) -> Any:
        if plain:
            return run(*args)
        x: Tensor = args[position]
        unseen = (x.is_cpu or x.is_cuda) and not (is_transformed(args) or _profiler_enabled())
        return run(*args) if unseen else dispatched(*args)

    return call


def is_transformed(args: Sequence[Any]) -> bool:
    """Whether torch would do something else for a call: trace it, count it or convert tensors."""
    if compiler.is_compiling():
        return True
    for question in TRANSFORMS:
        if question():
            return True
    return not _are_plain(args)


def tries_kernel(op: str) -> bool:
    """Whether an op's quick way in past torch, in :mod:`.native`, is to be asked first.

    It computes what is plain fp32 in CPU memory, where torch does nothing but compute.
    """
    return not compiler.is_dynamo_compiling() and backends.cpu_kernel_is_chosen(op, OFFERED[op])


_TENSORS = frozenset((Tensor, torch.nn.Parameter))
_NUMBERS = frozenset((type(None), int, float, bool))


def _are_plain(args: Sequence[Any]) -> bool:
    """Whether tensors are what they seem: memory, of no subclass, with no pending operation."""
    for argument in args:
        kind = type(argument)
        if kind in _TENSORS:
            if argument.is_neg() or argument._is_zerotensor():
                return False
        elif kind in _NUMBERS:
            continue
        elif kind is list or kind is tuple:
            if not _are_plain(argument):
                return False
        elif isinstance(argument, Tensor):
            return False
    return True


def device_type(x: Tensor) -> str:
    """``x.device.type``, which takes as long as a check of all of x where it is "cpu"."""
    return "cpu" if x.is_cpu else x.device.type


def without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """For implementations made of torch ops: autocast stays on inside an op and recasts them."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        device = next(a.device.type for a in args if isinstance(a, Tensor))
        if not torch.is_autocast_enabled(device):
            return function(*args)
        with torch.autocast(device, enabled=False):
            return function(*args)

    return run


def triton_kernel(module: str, function: str) -> Callable[..., Any]:
    """A launcher of snkernels.kernels.triton, imported when first called: triton is optional."""

    @functools.cache
    def load() -> Callable[..., Any]:
        return getattr(importlib.import_module(f"snkernels.kernels.triton.{module}"), function)

    return lambda *args: load()(*args)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd must see the op; where not, calling it directly costs half as much."""
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def autocasts(device: str) -> bool:
    """Whether autocast is on for a type of device; never where torch has none."""
    # Dynamo of torch 2.11 cannot trace the question, so it is only asked where it is one.
    available = device in ("cpu", "cuda") or torch.amp.is_autocast_available(device)
    return available and torch.is_autocast_enabled(device)


def autocast_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which autocast, where it is on, would hand a tensor to a linear layer."""
    if dtype == torch.float64 or not autocasts(device):
        return dtype
    return torch.get_autocast_dtype(device)


def autocast(x: Tensor) -> Tensor:
    """Casts x as autocast, where it is on, would for a linear layer."""
    dtype = autocast_dtype(device_type(x), x.dtype)
    return x if dtype == x.dtype else x.to(dtype)
