"""The gradients of ``multi_stitch`` and ``multi_stitch_layer_norm`` in Triton.

Gradients of one kind are computed for all groups in one buffer, by sums over the chunks of each
group's rows in a fixed order, and copied from there, as new tensors would have new addresses.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from snkernels.kernels.triton.groups import (
    BIAS,
    LORA_A,
    LORA_B,
    NORM_BIAS,
    NORM_WEIGHT,
    WEIGHT,
    Groups,
)
from snkernels.kernels.triton.merge import merged_of_groups
from snkernels.kernels.triton.multi_stitch import low_rank, project
from snkernels.kernels.triton.outer import outer
from snkernels.kernels.triton.residual_layer_norm import normalize_rows_backward
from snkernels.kernels.triton.sums import column_sums


def multi_stitch_backward(
    grad_y: Tensor | None,
    grad_normed: Tensor | None,
    x: Tensor,
    group_offsets: Tensor | list[int],
    tensors: Sequence[Tensor | None],
    scalings: Sequence[float],
    y: Tensor | None,
    mean: Tensor | None,
    rstd: Tensor | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Gradients of those of x and the tensors that ``needs`` marks, in order."""
    inputs = (x, *tensors)
    upper = grad_y if grad_normed is None else grad_normed
    assert upper is not None
    if upper.numel() == 0:
        pairs = zip(inputs, needs, strict=True)
        return [t.new_zeros(t.shape) for t, need in pairs if need and t is not None]
    groups = Groups(x, group_offsets, tensors, scalings, upper.shape[1])
    found: dict[int, Tensor] = {}  # by role, each (groups, *shape)

    def needed(role: int) -> torch.dtype | None:
        """The dtype of a role's gradients; None where nothing needs them."""
        one, own = groups.one(role), zip(tensors[role::6], needs[1 + role :: 6], strict=True)
        if one is None or not any(need and tensor is not None for tensor, need in own):
            return None
        return one.dtype

    if grad_normed is None:
        grad = upper
        if dtype := needed(BIAS):
            found[BIAS] = column_sums(grad, dtype, groups)
    else:
        assert y is not None and mean is not None and rstd is not None
        grad = torch.empty(y.shape, dtype=y.dtype, device=y.device)
        vectors = {role: needed(role) for role in (BIAS, NORM_WEIGHT, NORM_BIAS)}
        sums = normalize_rows_backward(
            *(grad_y, grad_normed, None, None, None, y, mean, rstd),
            *(groups.parameter(NORM_WEIGHT), grad, None, list(vectors.values()), groups),
        )
        found.update(zip((role for role, dtype in vectors.items() if dtype), sums, strict=True))
    need_A, need_B = needed(LORA_A), needed(LORA_B)
    if dtype := needed(WEIGHT):
        found[WEIGHT] = outer(grad, x, dtype, groups)
    if need_A:
        low_grad = low_rank(groups, grad, LORA_B)
        found[LORA_A] = outer(x, low_grad, need_A, groups, transposed=True)
    if need_B:
        found[LORA_B] = outer(grad, low_rank(groups, x), need_B, groups)

    grads: list[Tensor] = []
    if needs[0]:
        grad_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
        grads.append(project(groups, grad, grad_x, merged_of_groups(groups, grad)))
    own: list[Tensor] = []
    stacked: list[Tensor] = []
    for i, (tensor, need) in enumerate(zip(tensors, needs[1:], strict=True)):
        whole = found.get(i % 6)
        if need and tensor is not None and whole is not None:
            own.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device))
            stacked.append(whole[i // 6][tuple(map(slice, tensor.shape))])  # all, or a lower rank's
    if own:
        # Outputs of an op must not share memory. One launch, which reads no table of addresses.
        torch._foreach_copy_(own, stacked)
    return grads + own
