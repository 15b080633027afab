"""``stitch_layer_norm``: the projection and the entry block's LayerNorm, with both outputs.

The block that a stitch leads into goes on with h + γ · attn(LN(h)), so it needs y and LN(y).
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snkernels import reference
from snkernels.kernels import native
from snkernels.ops.autograd import applied, differentiable_once, directly
from snkernels.ops.checks import (
    as_rows,
    check_input,
    check_number,
    check_stitch,
    check_tensor,
    from_rows,
)
from snkernels.ops.library import (
    autocast,
    needs_grad,
    register,
    tries_kernel,
    triton_kernel,
    without_autocast,
)
from snkernels.ops.stitch import backward_op as stitch_backward
from snkernels.ops.stitch import empty_grads, spread


def _fake(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return native.norm_outputs(x, weight.shape[0])


def _fake_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    return empty_grads((x, weight, bias, lora_A, lora_B, norm_weight, norm_bias), needs)


# Their products are torch's.
_triton = without_autocast(triton_kernel("stitch_layer_norm", "stitch_layer_norm_forward"))
_triton_backward = without_autocast(
    triton_kernel("stitch_layer_norm", "stitch_layer_norm_backward")
)


@without_autocast
def _cuda(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    done = native.cuda_stitch_layer_norm(x, weight, *others)
    return _triton(x, weight, *others) if done is None else done


_forward_op = register(
    "stitch_layer_norm(Tensor x, Tensor weight, Tensor? bias, Tensor? lora_A, Tensor? lora_B,"
    " float scaling, Tensor? norm_weight, Tensor? norm_bias, float eps)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    implementations={
        "torch": without_autocast(reference.stitch_layer_norm),
        "cpu": native.stitch_layer_norm_forward,
        "triton": _triton,
        "cuda": _cuda,
    },
)
_backward_op = register(
    "stitch_layer_norm_backward(Tensor? grad_y, Tensor grad_normed, Tensor x, Tensor weight,"
    " Tensor? bias, Tensor? lora_A, Tensor? lora_B, float scaling, Tensor y, Tensor mean,"
    " Tensor rstd, Tensor? norm_weight, Tensor? norm_bias, bool[] needs) -> Tensor[]",
    fake=_fake_backward,
    implementations={
        "torch": without_autocast(reference.stitch_layer_norm_backward),
        "cpu": native.stitch_layer_norm_backward,
        "triton": _triton_backward,
        # Only the forward is in CUDA C++, and the residuals of all backends are the same.
        "cuda": _triton_backward,
    },
)


def _forward(x: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op, of tokens in any shape: what is saved of them must not depend on the way in."""
    y, normed, mean, rstd = _forward_op(as_rows(x), *others)
    return from_rows(y, x), from_rows(normed, x), mean, rstd


class _StitchLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor | None,
        lora_B: Tensor | None,
        scaling: float,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        done: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, Tensor]:
        if done is None:
            norm = norm_weight, norm_bias, eps
            done = _forward(x, weight, bias, lora_A, lora_B, scaling, *norm)
        y, normed, mean, rstd = done
        ctx.save_for_backward(
            x, weight, bias, lora_A, lora_B, y, mean, rstd, norm_weight, norm_bias
        )
        ctx.scaling = scaling
        ctx.set_materialize_grads(False)
        return y, normed

    @staticmethod
    @differentiable_once("stitch_layer_norm")
    def backward(ctx: Any, grad_y: Tensor | None, grad_normed: Tensor | None) -> Any:
        needs = [n for i, n in enumerate(ctx.needs_input_grad) if i not in (5, 8, 9)]
        if grad_normed is None:  # LN(y) was not used: its parameters get no gradient, as in torch
            needs[5:] = False, False
            if grad_y is None:
                return (None,) * 10
        x, *tensors, y, mean, rstd, norm_weight, norm_bias = ctx.saved_tensors
        grads = None
        if tries_kernel("stitch_layer_norm_backward"):
            parameters = *tensors, norm_weight, norm_bias, ctx.scaling
            given = grad_y, grad_normed, x, parameters, y, mean, rstd
            grads = native.stitch_gradients(*given, needs)
        if grads is None:
            upper = [None if g is None else as_rows(g) for g in (grad_y, grad_normed)]
            stitch = as_rows(x), *tensors, ctx.scaling
            if grad_normed is None:
                made = stitch_backward(upper[0], *stitch, needs[:5])
            else:
                residuals = as_rows(y), mean, rstd, norm_weight, norm_bias
                made = _backward_op(*upper, *stitch, *residuals, needs)
            grad_x, *others = spread(made, needs)
            grads = [None if grad_x is None else from_rows(grad_x, x), *others]
        *stitch_grads, norm_weight_grad, norm_bias_grad = grads
        return *stitch_grads, None, norm_weight_grad, norm_bias_grad, None, None


_apply, _apply_directly = applied(_StitchLayerNorm), directly(_StitchLayerNorm)


def stitch_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    lora_A: Tensor | None = None,
    lora_B: Tensor | None = None,
    scaling: float = 1.0,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Projects tokens to the other anchor's width and normalises them for its entry block.

    y is that of :func:`snkernels.ops.stitch`; LN(y) = (y − mean) / √(var + eps) · norm_weight +
    norm_bias over the last dimension of the y that is returned, with fp32 two-pass statistics
    (fp64 for fp64).

    Args:
        x: tokens, (..., in), float16, bfloat16, float32 or float64.
        weight: W, (out, in); this and the following may be float16, bfloat16 or float32 in any
            mixture, and float64 where x is.
        bias: (out,) or None.
        lora_A: A, (r, in), or None, together with lora_B, for no low-rank part. r may be 0.
        lora_B: B, (out, r).
        scaling: s, in the paper 1/r.
        norm_weight: (out,) or None.
        norm_bias: (out,) or None.
        eps: added to the variance.

    Returns:
        y and LN(y), both (..., out), both in the dtype of x; under autocast both in autocast's
        dtype (torch's own layer_norm would return fp32 there).

    Raises:
        TypeError, ValueError: arguments that do not fit together.
    """
    norm = norm_weight, norm_bias
    if tries_kernel("stitch_layer_norm"):
        operands = weight, bias, lora_A, lora_B
        done = native.stitch_layer_norm(x, (*operands, *norm, scaling), eps)
        if done is not None:
            if len(done) == 2:
                return done
            return _apply_directly(x, *operands, scaling, *norm, eps, done)
    check_input(x)
    check_stitch(x, weight, bias, lora_A, lora_B, scaling)
    check_tensor("norm_weight", norm_weight, x, (weight.shape[0],))
    check_tensor("norm_bias", norm_bias, x, (weight.shape[0],))
    check_number("eps", eps, 0.0)
    if lora_A is not None and lora_A.shape[0] == 0:
        lora_A = lora_B = None
    tensors = autocast(x), weight, bias, lora_A, lora_B
    arguments = *tensors, float(scaling), *norm, float(eps)
    training = needs_grad(*tensors, *norm)
    y, normed, *_ = _apply(*arguments, None) if training else _forward(*arguments)
    return y, normed
