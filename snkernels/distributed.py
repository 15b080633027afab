"""Data-parallel training of a model of which every step, on every rank, uses another part."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from snkernels import collectives

# Larger gradients are reduced where they lie: a copy would cost more than a collective of its own.
_PACKED_BELOW = 1 << 20


def broadcast_parameters(model: nn.Module) -> None:
    """Give the parameters and buffers of all ranks the values of rank 0.

    Every rank must call it; without ``torch.distributed`` it does nothing.

    Raises:
        ValueError: If the models of two ranks differ in more than values; the message says where.
    """
    tensors = model.state_dict()
    described = {name: f"{tuple(t.shape)} of {t.dtype}" for name, t in tensors.items()}
    first, *others = collectives.gather(described)
    for rank, other in enumerate(others, start=1):
        for name in [*first, *(name for name in other if name not in first)]:
            if first.get(name) != other.get(name):
                raise ValueError(
                    f"model must be the same on all ranks, but its {name} is "
                    f"{first.get(name, 'missing')} on rank 0 and "
                    f"{other.get(name, 'missing')} on rank {rank}"
                )
    collectives.broadcast(tensors.values())


@torch.no_grad()
def average_gradients(model: nn.Module) -> None:
    """Average over all ranks the gradients of the parameters that some rank used in this step.

    It takes the place of ``DistributedDataParallel`` for a model whose routes use different
    parameters: a parameter that no rank used is not communicated and keeps ``grad`` None, so that
    the optimizer skips it; where only other ranks used it, zeros stand in for this rank's gradient.
    Which those are the ranks tell each other by one byte per parameter, so nothing walks over the
    graph of autograd, and it holds for any routes: drawn, given, one per image, or several.  It
    sends fewer bytes than ``DistributedDataParallel``, but not while ``backward`` still runs.

    Every rank must call it once per optimizer step, after the last ``backward`` (before a
    ``GradScaler`` unscales), with gradients that began as None, as ``zero_grad`` leaves them.
    All ranks then hold the same bits.  Without ``torch.distributed`` it does nothing.

    A training script for ``torchrun --nproc-per-node=8 train.py``::

        dist.init_process_group()  # before the model, whose draws depend on the rank
        model = StitchedViT(small, large, draws="equal_cost")
        snkernels.broadcast_parameters(model)
        for images, labels in loader:  # over a DistributedSampler
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            snkernels.average_gradients(model)
            optimizer.step()

    Args:
        model: The same model on every rank.
    """
    if not collectives.distributed():
        return
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        return
    used = torch.tensor(
        [parameter.grad is not None for parameter in parameters],
        dtype=torch.uint8,
        device=parameters[0].device,
    )
    dist.all_reduce(used, dist.ReduceOp.MAX)
    small: dict[tuple[torch.dtype, torch.device], list[Tensor]] = {}
    large: list[Tensor] = []
    for parameter, anywhere in zip(parameters, used.tolist(), strict=True):
        if not anywhere:
            continue
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        gradient = parameter.grad
        if gradient.nbytes < _PACKED_BELOW:
            small.setdefault((gradient.dtype, gradient.device), []).append(gradient)
        else:
            large.append(gradient)
    packed = [
        *((torch.cat([g.flatten() for g in group]), group) for group in small.values()),
        *((gradient.contiguous(), [gradient]) for gradient in large),
    ]
    if not packed:
        return
    # Before the sum, which could overflow in half precision.
    torch._foreach_div_([flat for flat, _ in packed], collectives.world_size())
    for work in [dist.all_reduce(flat, async_op=True) for flat, _ in packed]:
        work.wait()
    for flat, group in packed:
        if flat is not group[0]:
            parts = flat.flatten().split([gradient.numel() for gradient in group])
            torch._foreach_copy_(group, [p.view_as(g) for p, g in zip(parts, group, strict=True)])
