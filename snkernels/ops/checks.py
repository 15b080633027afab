"""Argument checks that ops share: messages name the argument, what it was, what it must be."""

import math
import numbers

import torch
from torch import Tensor
from torch._C._functorch import is_dead_tensor_wrapper  # type: ignore[attr-defined]
from torch.autograd import forward_ad

_FLOAT32 = torch.float32


def check_stitch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> None:
    """Raises TypeError or ValueError unless the arguments fit together."""
    check_tensor("weight", weight, x, (None, None))
    out_features, in_features = weight.shape
    if x.dim() == 0 or x.shape[-1] != in_features:
        raise ValueError(
            f"x must have shape (..., {in_features}) to fit weight {tuple(weight.shape)}, "
            f"but it has {tuple(x.shape)}"
        )
    check_tensor("bias", bias, x, (out_features,))
    if (lora_A is None) != (lora_B is None):
        given, absent = ("lora_A", "lora_B") if lora_B is None else ("lora_B", "lora_A")
        raise ValueError(f"lora_A and lora_B go together, but {given} is given and {absent} is not")
    check_tensor("lora_A", lora_A, x, (None, in_features))
    if lora_A is not None:
        check_tensor("lora_B", lora_B, x, (out_features, lora_A.shape[0]))
    check_number("scaling", scaling)


def check_number(name: str, value: float, least: float = -math.inf) -> None:
    """Raises unless ``value`` is a finite real number of at least ``least``."""
    # A float is one at once; to ask an abstract class takes longer than all the rest.
    real = type(value) is float or isinstance(value, numbers.Real)
    if not real or not math.isfinite(value) or value < least:
        of_at_least = "" if least == -math.inf else f" of at least {least:g}"
        raise ValueError(f"{name} must be a finite number{of_at_least}, but it is {value!r}")


def check_tensor(
    name: str, tensor: Tensor | None, like: Tensor, shape: tuple[int | None, ...]
) -> None:
    """Checks an optional tensor's kind, device and shape; None in a matrix's is any size."""
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, but it is {type(tensor).__name__}")
    if tensor.dtype is not _FLOAT32:
        _check_dtype(name, tensor, like)
    # To make two devices and compare them takes longer than the rest.
    if not (tensor.is_cpu and like.is_cpu) and tensor.device != like.device:
        raise ValueError(
            f"{name} must be on {like.device}, where the tokens are, but is on {tensor.device}"
        )
    have = tensor.shape
    if have == shape:
        return
    if len(have) == len(shape) == 2 and shape[0] in (None, have[0]) and shape[1] in (None, have[1]):
        return
    wanted = ", ".join("any" if want is None else str(want) for want in shape)
    raise ValueError(f"{name} must have shape ({wanted}), but it has {tuple(have)}")


def _check_dtype(name: str, tensor: Tensor, like: Tensor) -> None:
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be a floating-point tensor, but it is {tensor.dtype}")
    if tensor.dtype == torch.float64 and like.dtype != torch.float64:
        raise TypeError(f"{name} must be at most float32 beside {like.dtype}, but it is float64")


def as_rows(x: Tensor) -> Tensor:
    """(…, width) as (rows, width), also where there are no rows or no width."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def from_rows(rows: Tensor, x: Tensor) -> Tensor:
    """(rows, width) in the shape that ``x`` had before :func:`as_rows`.

    No view to autograd, which would forbid users to write into what its Functions return.
    """
    if x.dim() == 2:
        return rows
    shaped: Tensor = torch.ops.aten._unsafe_view(rows, [*x.shape[:-1], rows.shape[1]])
    return shaped


def check_input(x: Tensor, name: str = "x") -> None:
    """Raises unless ``x`` is a tensor of a dtype that ops compute in, outside all transforms."""
    # Called without a gradient an op would pass them by, with zeros for the tangents of jvp.
    if torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0:
        raise RuntimeError(
            "torch.func transforms (grad, vmap, jvp, …) and forward-mode differentiation do not "
            "reach through the ops of snkernels: use backward() or torch.autograd.grad"
        )
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, but it is {type(x).__name__}")
    if not torch.compiler.is_compiling() and is_dead_tensor_wrapper(x):
        raise ValueError(f"{name} must be a tensor of now, but its torch.func transform has ended")
    if x.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be float16, bfloat16, float32 or float64, but it is {x.dtype}"
        )
