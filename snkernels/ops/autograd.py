"""What the ops' thin autograd.Functions share."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling


def differentiable_once(op: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """As torch's ``once_differentiable``, whose error does not say which op it is about."""
    message = f"{op} is differentiable once: its gradient cannot be differentiated again"

    def decorate(backward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(backward)
        def run(ctx: Any, *grads: Tensor | None) -> Any:
            if not torch.is_grad_enabled():
                return backward(ctx, *grads)
            with torch.no_grad():
                found = backward(ctx, *grads)
            # A node that raises when a second derivative goes through it.
            refuse: Any = torch._C._functions.DelayedError(message.encode(), len(found))
            return refuse(*(g if g is None else g.detach().requires_grad_() for g in found))

        return run

    return decorate


def directly(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """``function.apply`` without a look for tensors of torch.func transforms that have ended.

    That look takes a third of its time, and the ops are not for such tensors.
    """
    base: Any = super(torch.autograd.Function, function)
    apply: Callable[..., Any] = base.apply
    return apply


def applied(function: type[torch.autograd.Function]) -> Callable[..., Any]:
    """The same where nobody knows whether code is being compiled, which goes by ``apply`` alone."""
    direct = directly(function)

    def apply(*arguments: Any) -> Any:
        return (function.apply if is_compiling() else direct)(*arguments)

    return apply
