"""How an op enters torch: schema, fake, and the backends behind it.

Ops are defined with ``torch.library.Library``, a third of the call cost of the decorator, and each
has a thin ``torch.autograd.Function`` on top. Inside, an op is opaque to torch.compile.
"""

import functools
import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from snkernels import backends

_library = torch.library.Library("snkernels", "DEF")

# op -> the backends it has, best known first; ``snkernels info`` reads it.
OFFERED: dict[str, tuple[str, ...]] = {}


def register(
    schema: str, *, fake: Callable[..., Any], implementations: dict[str, Callable[..., Any]]
) -> None:
    """Defines ``snkernels::<schema>``, which runs the implementation of the chosen backend.

    Every implementation takes the schema's arguments. The dtype that decides is that of ``x``.
    """
    name = schema.split("(", 1)[0]
    offered = OFFERED[name] = tuple(implementations)
    position = [a.name for a in torch._C.parse_schema(f"snkernels::{schema}").arguments].index("x")

    def run(*args: Any) -> Any:
        x: Tensor = args[position]
        choice = backends.choose(name, offered, x.device.type, x.dtype)
        return implementations[choice.backend](*args)

    _library.define(schema)
    for key in ("CPU", "CUDA"):
        _library.impl(name, run, key)
    torch.library.register_fake(f"snkernels::{name}", fake, lib=_library)


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
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def autocast_dtype(device: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype in which autocast, where it is on, would hand a tensor to a linear layer."""
    if dtype == torch.float64 or not torch.amp.is_autocast_available(device):
        return dtype
    if not torch.is_autocast_enabled(device):
        return dtype
    return torch.get_autocast_dtype(device)
