"""The specification: every op in a few lines of torch, which every backend must equal.

It is also the ``torch`` backend, for all that no kernel covers: fp64, and GPUs as long as no record
speaks for a kernel. Half precision on the CPU computes in fp32, because half GEMMs are slower
there; on a GPU the operands stay half, where tensor cores accumulate in fp32 by themselves, and
only the merged weight and its gradient are rounded once. The low-rank intermediate is never rounded
to half precision.
"""

import functools
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which GEMMs over ``x`` run."""
    if _is_half(x.dtype) and not x.is_cuda:
        return torch.float32
    return x.dtype


def merged_weight(
    weight: Tensor, lora_A: Tensor | None, lora_B: Tensor | None, scaling: float
) -> Tensor:
    """W + scaling · B A, shape (out, in), in fp32 (fp64 where an operand is)."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    if lora_A is None or lora_B is None:
        return weight.to(wide)
    wide = torch.promote_types(wide, torch.promote_types(lora_A.dtype, lora_B.dtype))
    return torch.addmm(weight.to(wide), lora_B.to(wide), lora_A.to(wide), alpha=scaling)


def stitch(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> Tensor:
    """Y = x Wᵀ + bias + scaling · (x Aᵀ) Bᵀ (SN-Netv2, low-rank stitching layer).

    Shapes: x (M, in), weight (out, in), bias (out,), lora_A (r, in), lora_B (out, r) → (M, out),
    in the dtype of x.
    """
    dtype = compute_dtype(x)
    weight = _merged(dtype, weight, lora_A, lora_B, scaling)
    return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


def _merged(
    dtype: torch.dtype,
    weight: Tensor,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
) -> Tensor:
    """W + scaling · B A, rounded once to the dtype of the products."""
    factors = [tensor for tensor in (lora_B, lora_A) if tensor is not None]
    if factors and _is_half(dtype) and all(t.dtype == dtype for t in (weight, *factors)):
        # One launch on a GPU, where the sum is made in fp32 too.
        return torch.addmm(weight, *factors, alpha=scaling)
    return merged_weight(weight, lora_A, lora_B, scaling).to(dtype)


def _is_half(dtype: torch.dtype) -> bool:
    return dtype in (torch.float16, torch.bfloat16)


def layer_norm(
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LN(y) over the last dimension in a dtype, or y's own; fp32 mean and 1/σ of each row."""
    dtype = dtype or y.dtype
    if has_exact_layer_norm(y):
        affine = [vector for vector in (norm_weight, norm_bias) if vector is not None]
        common = _common_dtype(dtype, y.dtype, *(vector.dtype for vector in affine))
        normed, mean, rstd = torch.native_layer_norm(
            y.to(common),
            y.shape[-1:],
            None if norm_weight is None else norm_weight.to(common),
            None if norm_bias is None else norm_bias.to(common),
            eps,
        )
        return normed.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)
    wide = torch.promote_types(y.dtype, torch.float32)
    values = y.to(wide)
    mean = values.mean(-1, keepdim=True)
    rstd = (values - mean).square().mean(-1, keepdim=True).add(eps).rsqrt()
    normed = (values - mean) * rstd
    if norm_weight is not None:
        normed = normed * norm_weight.to(wide)
    if norm_bias is not None:
        normed = normed + norm_bias.to(wide)
    return normed.to(dtype), mean.squeeze(-1), rstd.squeeze(-1)


def has_exact_layer_norm(y: Tensor) -> bool:
    """Whether torch's own LayerNorm serves, which is faster than the formula in steps.

    On a GPU it goes by y - mean, and has fp32 statistics for half rows. On the CPU it goes by
    y / σ - mean / σ, which loses the digits of rows with a large mean, and rounds the statistics.
    """
    return y.is_cuda


def _common_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype in which torch's LayerNorm, which takes only one on a GPU, loses nothing."""
    if len(set(dtypes)) == 1:
        return dtypes[0]
    return functools.reduce(torch.promote_types, dtypes, torch.float32)


def stitch_backward(
    grad_y: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of (x, weight, bias, lora_A, lora_B) that ``needs`` marks, in order."""
    dtype = compute_dtype(x)
    wide = torch.promote_types(dtype, torch.float32)
    grad, rows = grad_y.to(dtype), x.to(dtype)
    need_x, need_weight, need_bias, need_A, need_B = needs
    need_A, need_B = need_A and lora_A is not None, need_B and lora_B is not None
    grads = []
    if need_x:
        merged = _merged(dtype, weight, lora_A, lora_B, scaling)
        grads.append((grad @ merged).to(x.dtype))
    # In bf16 that of W + scaling · B A gives those of A and B too, and costs less than products of
    # the low-rank intermediates, which are fp32. In fp32 it would cost digits, and in fp16 what it
    # is about to be multiplied by may be all that keeps a gradient in range.
    by_merged = dtype == torch.bfloat16
    of_merged = grad.t() @ rows if need_weight or (by_merged and (need_A or need_B)) else None
    if need_weight and of_merged is not None:
        grads.append(of_merged.to(weight.dtype))
    if need_bias and bias is not None:
        grads.append(grad_y.sum(0, dtype=wide).to(bias.dtype))
    if need_A and lora_A is not None and lora_B is not None:
        if of_merged is not None and by_merged:
            grad_A = _scaled(scaling, lora_B.to(dtype).t(), of_merged)
        else:
            grad_A = _scaled(scaling, (grad.to(wide) @ lora_B.to(wide)).t(), rows.to(wide))
        grads.append(grad_A.to(lora_A.dtype))
    if need_B and lora_A is not None and lora_B is not None:
        if of_merged is not None and by_merged:
            grad_B = _scaled(scaling, of_merged, lora_A.to(dtype).t())
        else:
            grad_B = _scaled(scaling, grad.to(wide).t(), rows.to(wide) @ lora_A.to(wide).t())
        grads.append(grad_B.to(lora_B.dtype))
    return grads


def _scaled(scaling: float, left: Tensor, right: Tensor) -> Tensor:
    """The product of both times ``scaling``, rounded once."""
    return torch.addmm(left.new_empty(1), left, right, beta=0, alpha=scaling)


def layer_norm_backward(
    grad_normed: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y (by way of LN alone), norm weight and norm bias.

    In fp32 (fp64 for fp64), but on a GPU, where all are of one half dtype, in that.
    """
    if has_exact_layer_norm(y):
        weight = y.new_ones(y.shape[-1:]) if norm_weight is None else norm_weight
        common = _common_dtype(grad_normed.dtype, y.dtype, weight.dtype)
        weight = weight.to(common)
        return torch.ops.aten.native_layer_norm_backward(
            grad_normed.to(common),
            y.to(common),
            y.shape[-1:],
            *(statistic.contiguous().unsqueeze(-1) for statistic in (mean, rstd)),
            weight,
            weight,  # in place of the bias, for the shape and dtype of its gradient
            [True] * 3,
        )
    wide = torch.promote_types(y.dtype, torch.float32)
    grad, rstd = grad_normed.to(wide), rstd.unsqueeze(-1)
    normalized = (y.to(wide) - mean.unsqueeze(-1)) * rstd
    weighted = grad if norm_weight is None else grad * norm_weight.to(wide)
    grad_y = rstd * (
        weighted
        - weighted.mean(-1, keepdim=True)
        - normalized * (weighted * normalized).mean(-1, keepdim=True)
    )
    return grad_y, (grad * normalized).sum(0), grad.sum(0)


def stitch_layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor | None,
    lora_B: Tensor | None,
    scaling: float,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, LN(y), mean, 1/σ): a stitch and the LayerNorm of what it returns."""
    y = stitch(x, weight, bias, lora_A, lora_B, scaling)
    return y, *layer_norm(y, norm_weight, norm_bias, eps)


def stitch_layer_norm_backward(
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
    """As :func:`stitch_backward`, and those of norm_weight and norm_bias."""
    grad, grad_norm_weight, grad_norm_bias = layer_norm_backward(
        grad_normed, y, mean, rstd, norm_weight
    )
    if grad_y is not None:
        grad = grad + grad_y
    grads = stitch_backward(grad, x, weight, bias, lora_A, lora_B, scaling, needs[:5])
    if needs[5] and norm_weight is not None:
        grads.append(grad_norm_weight.to(norm_weight.dtype))
    if needs[6] and norm_bias is not None:
        grads.append(grad_norm_bias.to(norm_bias.dtype))
    return grads


def residual(
    h: Tensor, branch: Tensor, layer_scale: Tensor | None, drop_path_scale: Tensor | None
) -> Tensor:
    """The sum h + layer_scale · drop_path_scale · branch, in the wider dtype of h and branch.

    Shapes: h, branch (M, N), layer_scale (N,), drop_path_scale (B,) for M / B rows each.
    """
    dtype = torch.promote_types(h.dtype, branch.dtype)
    factors = [f for f in (layer_scale, _of_rows(drop_path_scale, branch)) if f is not None]
    if len(factors) < 2:
        # Product and sum are rounded once, without copies in fp32.
        return torch.addcmul(h, branch, *factors).to(dtype) if factors else h + branch
    wide = torch.promote_types(dtype, torch.float32)
    for factor in factors:
        branch = branch.to(wide) * factor.to(wide)
    return (h.to(wide) + branch).to(dtype)


def residual_backward(
    grad: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
) -> tuple[Tensor, Tensor | None]:
    """Gradients of branch and layer_scale, given that of the sum, which is also that of h.

    In fp32 (fp64 for fp64).
    """
    grad = grad.to(torch.promote_types(grad.dtype, torch.float32))
    factor = _of_rows(drop_path_scale, branch)
    scaled = grad if factor is None else grad * factor.to(grad.dtype)
    if layer_scale is None:
        return scaled, None
    return scaled * layer_scale.to(grad.dtype), (scaled * branch.to(grad.dtype)).sum(0)


def _of_rows(drop_path_scale: Tensor | None, rows: Tensor) -> Tensor | None:
    """What stochastic depth multiplies each row by, as a column."""
    if drop_path_scale is None or not rows.shape[0]:
        return None
    each = rows.shape[0] // drop_path_scale.shape[0]
    return drop_path_scale.repeat_interleave(each).unsqueeze(-1)
