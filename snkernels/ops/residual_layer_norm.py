"""``residual_layer_norm``: the op between all other ops of a pre-norm ViT.

After attention or an MLP a block computes h + γ · s · branch, and what comes next computes LN of
that: done apart this reads and writes the residual stream three times, here once.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from snkernels import reference
from snkernels.kernels import native
from snkernels.ops.autograd import applied, differentiable_once, directly
from snkernels.ops.checks import as_rows, check_input, check_number, check_tensor, from_rows
from snkernels.ops.library import (
    autocast_dtype,
    device_type,
    needs_grad,
    register,
    tries_kernel,
    triton_kernel,
    without_autocast,
)
from snkernels.ops.stitch import empty_grads, spread


def _fake(
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dtype = torch.promote_types(x.dtype, branch.dtype)
    return native.norm_outputs(x, x.shape[1], dtype, normed_dtype)


def _fake_backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    return empty_grads((x, branch, layer_scale, norm_weight, norm_bias), needs)


@without_autocast
def _torch(
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    normed_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    x, branch = x.contiguous(), branch.contiguous()  # or outputs would have their strides
    total = reference.residual(x, branch, layer_scale, drop_path_scale)
    return total, *reference.layer_norm(total, norm_weight, norm_bias, eps, normed_dtype)


@without_autocast
def _torch_backward(
    grad_sum: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    total: Tensor,
    mean: Tensor,
    rstd: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    grad = grad_sum
    norm_grads: list[Tensor | None] = [None, None]
    if grad_normed is not None:
        grad, *norm_grads = reference.layer_norm_backward(
            grad_normed, total, mean, rstd, norm_weight
        )
        if grad_sum is not None:
            grad = grad + grad_sum
    if grad is None:
        grad = torch.zeros_like(total)
    grad_branch, grad_layer_scale = reference.residual_backward(
        grad, branch, layer_scale, drop_path_scale
    )
    tensors = (x, branch, layer_scale, norm_weight, norm_bias)
    grads = (grad, grad_branch, grad_layer_scale, *norm_grads)
    results: list[Tensor] = []
    for tensor, g, need in zip(tensors, grads, needs, strict=True):
        if need and tensor is not None and g is not None:
            own = g.to(tensor.dtype).contiguous()
            # Outputs of an op must not share memory, nor be its inputs.
            shared = any(own is other for other in (grad_sum, *results))
            results.append(own.clone() if shared else own)
    return results


_forward_op = register(
    "residual_layer_norm(Tensor x, Tensor branch, Tensor? layer_scale, Tensor? drop_path_scale,"
    " Tensor? norm_weight, Tensor? norm_bias, float eps, ScalarType normed_dtype)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    fake=_fake,
    implementations={
        "torch": _torch,
        "cpu": native.residual_layer_norm_forward,
        "triton": triton_kernel("residual_layer_norm", "residual_layer_norm_forward"),
    },
)
_backward_op = register(
    "residual_layer_norm_backward(Tensor? grad_sum, Tensor? grad_normed, Tensor x, Tensor branch,"
    " Tensor? layer_scale, Tensor? drop_path_scale, Tensor total, Tensor mean, Tensor rstd,"
    " Tensor? norm_weight, Tensor? norm_bias, bool[] needs) -> Tensor[]",
    fake=_fake_backward,
    implementations={
        "torch": _torch_backward,
        "cpu": native.residual_layer_norm_backward,
        "triton": triton_kernel("residual_layer_norm", "residual_layer_norm_backward"),
    },
)


def _forward(h: Tensor, branch: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The op, of tokens in any shape: what is saved of them must not depend on the way in."""
    total, normed, mean, rstd = _forward_op(as_rows(h), as_rows(branch), *others)
    return from_rows(total, h), from_rows(normed, h), mean, rstd


class _ResidualLayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        h: Tensor,
        branch: Tensor,
        layer_scale: Tensor | None,
        drop_path_scale: Tensor | None,
        norm_weight: Tensor | None,
        norm_bias: Tensor | None,
        eps: float,
        normed_dtype: torch.dtype | None,
        done: tuple[Tensor, ...] | None,
    ) -> tuple[Tensor, Tensor]:
        norm = norm_weight, norm_bias, eps, normed_dtype
        outputs = done or _forward(h, branch, layer_scale, drop_path_scale, *norm)
        total, normed, mean, rstd = outputs
        # Of h the backward needs no more than its shape and dtype, and of the branch where no
        # gradient of γ goes through it: mostly those of the sum, which is kept anyway. The quick
        # way, which takes one dtype alone, need not be asked for it.
        quick, learnt = done is not None, ctx.needs_input_grad[2]
        ctx.save_for_backward(
            None if quick or h.dtype == total.dtype else h,
            None if not learnt and (quick or branch.dtype == total.dtype) else branch,
            layer_scale,
            drop_path_scale,
            total,
            mean,
            rstd,
            norm_weight,
            norm_bias,
        )
        ctx.set_materialize_grads(False)
        return total, normed

    @staticmethod
    @differentiable_once("residual_layer_norm")
    def backward(ctx: Any, grad_sum: Tensor | None, grad_normed: Tensor | None) -> Any:
        h, branch, layer_scale, drop_path_scale, total, *rest = ctx.saved_tensors
        h, branch = (total if t is None else t for t in (h, branch))
        need_h, need_branch, need_scale, _, *need_norm = ctx.needs_input_grad[:6]
        if grad_normed is None:  # LN(sum) was not used, so its parameters get no gradient
            need_norm = [False, False]
        needs = [need_h, need_branch, need_scale, *need_norm]
        if drop_path_scale is None and tries_kernel("residual_layer_norm_backward"):
            mean, rstd, *norm = rest
            operands = h, branch, layer_scale, *norm, total, mean, rstd
            done = native.residual_gradients(grad_sum, grad_normed, *operands, needs)
            if done is not None:
                return *done[:3], None, *done[3:], None, None, None
        tokens = (None if t is None else as_rows(t) for t in (grad_sum, grad_normed, h, branch))
        grads = _backward_op(*tokens, layer_scale, drop_path_scale, as_rows(total), *rest, needs)
        grad_h, grad_branch, grad_scale, *grads_of_norm = spread(grads, needs)
        grad_h, grad_branch = (
            None if g is None else from_rows(g, h) for g in (grad_h, grad_branch)
        )
        return grad_h, grad_branch, grad_scale, None, *grads_of_norm, None, None, None


_apply, _apply_directly = applied(_ResidualLayerNorm), directly(_ResidualLayerNorm)


def residual_layer_norm(
    h: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None = None,
    drop_path_scale: Tensor | None = None,
    norm_weight: Tensor | None = None,
    norm_bias: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor]:
    """Adds a branch to the residual stream and normalises the sum for what comes next.

    sum = h + layer_scale · drop_path_scale · branch, computed in fp32 (fp64 for fp64), and LN(sum)
    over the last dimension of the sum that is returned, with fp32 two-pass statistics.
    Differentiable once in every tensor but drop_path_scale.

    Args:
        h: the residual stream, (..., N), float16, bfloat16, float32 or float64.
        branch: what attention or the MLP returned, the shape of h, float16, bfloat16 or float32, or
            float64 where h is.
        layer_scale: γ of LayerScale, (N,), or None for 1.
        drop_path_scale: (B,), one value for each of the first dimension of h, as DropPath draws
            them: 0 or 1 / keep probability; None for 1.
        norm_weight: (N,) or None.
        norm_bias: (N,) or None.
        eps: added to the variance.

    Returns:
        The sum, (..., N), in the wider dtype of h and branch, and LN(sum), (..., N), in the same
        or, under autocast, in autocast's dtype, as only GEMMs read it.

    Raises:
        TypeError, ValueError: arguments that do not fit together.
    """
    if drop_path_scale is None and tries_kernel("residual_layer_norm"):
        done = native.residual_layer_norm(h, branch, layer_scale, norm_weight, norm_bias, eps)
        if done is not None:
            if len(done) == 2:
                return done
            # Autograd only keeps what is computed by now; tokens have users' own shape.
            norm = norm_weight, norm_bias, eps
            return _apply_directly(h, branch, layer_scale, None, *norm, None, done)
    _check(h, branch, layer_scale, drop_path_scale, norm_weight, norm_bias, eps)
    dtype = torch.promote_types(h.dtype, branch.dtype)
    tensors = h, branch, layer_scale, drop_path_scale, norm_weight, norm_bias
    arguments = *tensors, float(eps), autocast_dtype(device_type(h), dtype)
    training = needs_grad(*tensors)
    total, normed, *_ = _apply(*arguments, None) if training else _forward(*arguments)
    return total, normed


def _check(
    h: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> None:
    check_input(h, "h")
    if h.dim() == 0:
        raise ValueError("h must have at least one dimension, but it has none")
    features = h.shape[-1]
    check_tensor("branch", branch, h, tuple(h.shape))
    check_tensor("layer_scale", layer_scale, h, (features,))
    check_tensor("drop_path_scale", drop_path_scale, h, (h.shape[0],))
    check_tensor("norm_weight", norm_weight, h, (features,))
    check_tensor("norm_bias", norm_bias, h, (features,))
    check_number("eps", eps, 0.0)
    if drop_path_scale is not None and h.dim() == 1:
        raise ValueError("drop_path_scale must be None for h of one dimension: it scales samples")
    if drop_path_scale is not None and drop_path_scale.requires_grad:
        raise ValueError("drop_path_scale must not require grad: it is drawn, not learnt")
