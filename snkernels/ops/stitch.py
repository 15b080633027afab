"""``stitch``: the low-rank stitching projection (SN-Netv2, §3.3), y = x Wᵀ + b + s · (x Aᵀ) Bᵀ."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snkernels import reference
from snkernels.kernels import native
from snkernels.ops.autograd import applied, differentiable_once, directly
from snkernels.ops.checks import as_rows, check_input, check_stitch, from_rows
from snkernels.ops.library import (
    autocast,
    needs_grad,
    register,
    tries_kernel,
    without_autocast,
)


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


def _fake_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    return empty_grads((x, weight, bias, lora_A, lora_B), needs)


def empty_grads(tensors: Sequence[Tensor | None], needs: Sequence[bool]) -> list[Tensor]:
    """What a backward op returns, for its fake: one gradient for each tensor that needs it."""
    return [
        tensor.new_empty(tensor.shape)
        for tensor, need in zip(tensors, needs, strict=True)
        if need and tensor is not None
    ]


def spread(grads: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor | None]:
    """A backward op's gradients in the places of their inputs, None where none is needed."""
    remaining = iter(grads)
    return [next(remaining) if need else None for need in needs]


_forward_op = register(
    "stitch(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling)"
    " -> Tensor",
    fake=_fake,
    implementations={
        "torch": without_autocast(reference.stitch),
        "cpu": native.stitch_forward,
    },
)
backward_op = register(
    "stitch_backward(Tensor grad_y, Tensor x, Tensor weight, Tensor? bias, Tensor? lora_A,"
    " Tensor? lora_B, float scaling, bool[] needs) -> Tensor[]",
    fake=_fake_backward,
    implementations={
        "torch": without_autocast(reference.stitch_backward),
        "cpu": native.stitch_backward,
    },
)


def _forward(x: Tensor, *others: Any) -> Tensor:
    """The op, of tokens in any shape: what is saved of them must not depend on the way in."""
    return from_rows(_forward_op(as_rows(x), *others), x)


class _Stitch(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        done: tuple[Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight, bias, lora_A, lora_B)
        ctx.scaling = scaling
        return done[0] if done else _forward(x, weight, bias, lora_A, lora_B, scaling)

    @staticmethod
    @differentiable_once("stitch")
    def backward(ctx: Any, grad_y: Tensor) -> Any:
        needs = list(ctx.needs_input_grad[:5])
        x, *tensors = ctx.saved_tensors
        if tries_kernel("stitch_backward"):
            parameters = *tensors, None, None, ctx.scaling
            wanted = [*needs, False, False]
            done = native.stitch_gradients(grad_y, None, x, parameters, None, None, None, wanted)
            if done is not None:
                return *done[:5], None, None
        grads = backward_op(as_rows(grad_y), as_rows(x), *tensors, ctx.scaling, needs)
        grad_x, *others = spread(grads, needs)
        return None if grad_x is None else from_rows(grad_x, x), *others, None, None


_apply, _apply_directly = applied(_Stitch), directly(_Stitch)


def stitch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
) -> Tensor:
    """Projects tokens from one anchor's width to the other's.

    y = x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ, accumulated in fp32 (fp64 for fp64), where the low-rank
    intermediate x Aᵀ is never rounded to half precision. Differentiable once in every tensor.

    Args:
        x: tokens, (..., in), float16, bfloat16, float32 or float64.
        weight: W, (out, in); this and the following may be float16, bfloat16 or float32 in any
            mixture, and float64 where x is.
        bias: (out,) or None.
        lora_A: A, (r, in), or None, together with lora_B, for no low-rank part. r may be 0.
        lora_B: B, (out, r).
        scaling: s, in the paper 1/r.

    Returns:
        y, (..., out), in the dtype of x; under autocast in autocast's dtype, as of a linear layer.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
    """
    if tries_kernel("stitch"):
        done = native.stitch(x, (weight, bias, lora_A, lora_B, None, None, scaling))
        if done is not None:
            operands = x, weight, bias, lora_A, lora_B
            return _apply_directly(*operands, scaling, (done,)) if needs_grad(*operands) else done
    check_input(x)
    check_stitch(x, weight, bias, lora_A, lora_B, scaling)
    if lora_A is not None and lora_A.shape[0] == 0:
        lora_A = lora_B = None
    arguments = autocast(x), weight, bias, lora_A, lora_B, float(scaling)
    y: Tensor = _apply(*arguments, None) if needs_grad(*arguments[:5]) else _forward(*arguments)
    return y
