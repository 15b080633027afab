"""The specification: every op in a few lines of torch, which every backend must equal.

It is also the ``torch`` backend, for all that no kernel covers: fp64, and GPUs as long as no record
speaks for a kernel. Half precision on the CPU computes in fp32, because half GEMMs are slower
there; on a GPU the operands stay half, where tensor cores accumulate in fp32 by themselves, and
only the merged weight is rounded once. The low-rank intermediate is never rounded to half
precision.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which GEMMs over ``x`` run."""
    if x.dtype in (torch.float16, torch.bfloat16) and not x.is_cuda:
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
    weight = merged_weight(weight, lora_A, lora_B, scaling).to(dtype)
    return F.linear(x.to(dtype), weight, None if bias is None else bias.to(dtype)).to(x.dtype)


def layer_norm(
    y: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LN(y) over the last dimension in a dtype, or y's own; fp32 mean and 1/σ of each row."""
    wide = torch.promote_types(y.dtype, torch.float32)
    values = y.to(wide)
    mean = values.mean(-1, keepdim=True)
    rstd = (values - mean).square().mean(-1, keepdim=True).add(eps).rsqrt()
    normed = (values - mean) * rstd
    if norm_weight is not None:
        normed = normed * norm_weight.to(wide)
    if norm_bias is not None:
        normed = normed + norm_bias.to(wide)
    return normed.to(dtype or y.dtype), mean.squeeze(-1), rstd.squeeze(-1)


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
    grad = grad_y.to(wide)
    need_x, need_weight, need_bias, need_A, need_B = needs
    grads = []
    if need_x:
        merged = merged_weight(weight, lora_A, lora_B, scaling).to(dtype)
        grads.append((grad_y.to(dtype) @ merged).to(x.dtype))
    if need_weight:
        grads.append((grad.t() @ x.to(wide)).to(weight.dtype))
    if need_bias and bias is not None:
        grads.append(grad.sum(0).to(bias.dtype))
    if need_A and lora_A is not None and lora_B is not None:
        grads.append((scaling * (grad @ lora_B.to(wide)).t() @ x.to(wide)).to(lora_A.dtype))
    if need_B and lora_A is not None and lora_B is not None:
        grads.append((scaling * grad.t() @ (x.to(wide) @ lora_A.to(wide).t())).to(lora_B.dtype))
    return grads


def layer_norm_backward(
    grad_normed: Tensor, y: Tensor, mean: Tensor, rstd: Tensor, norm_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of y (by way of LN alone), norm weight and norm bias, in fp32 (fp64 for fp64)."""
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
    wide = torch.promote_types(dtype, torch.float32)
    return (h.to(wide) + _scaled(branch.to(wide), layer_scale, drop_path_scale)).to(dtype)


def residual_backward(
    grad: Tensor,
    branch: Tensor,
    layer_scale: Tensor | None,
    drop_path_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Gradients of branch and layer_scale, given that of the sum, which is also that of h."""
    return (
        _scaled(grad, layer_scale, drop_path_scale),
        _scaled(grad * branch.to(grad.dtype), None, drop_path_scale).sum(0),
    )


def _scaled(rows: Tensor, layer_scale: Tensor | None, drop_path_scale: Tensor | None) -> Tensor:
    if layer_scale is not None:
        rows = rows * layer_scale.to(rows.dtype)
    if drop_path_scale is not None and rows.shape[0]:
        each = rows.shape[0] // drop_path_scale.shape[0]
        rows = rows * drop_path_scale.to(rows.dtype).repeat_interleave(each).unsqueeze(-1)
    return rows
