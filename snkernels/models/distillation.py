"""Training all routes of a step towards the large anchor, whose logits come in the same pass."""

import torch
import torch.nn.functional as F
from torch import Tensor


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return how far routes are from a teacher: the mean over routes and images of T² · KL.

    The teacher gets no gradient.  To learn from the large anchor beside drawn routes::

        logits = model(images, routes=[LARGE, *model.draw(3)])
        loss = ... + distillation_loss(logits[1:], logits[0])

    Args:
        logits: Of the routes, (..., batch, classes), any floating dtype; computed in float32.
        teacher: Logits (batch, classes).
        temperature: T, which softens both distributions; positive.

    Returns:
        A scalar, float32 (float64 for float64 logits), in nats at T = 1.

    Raises:
        ValueError: If the shapes do not fit or ``temperature`` is not positive.

    Source: Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015.
    """
    if teacher.ndim != 2 or logits.shape[-2:] != teacher.shape:
        raise ValueError(
            "logits must have shape (..., batch, classes) and teacher (batch, classes), "
            f"got {tuple(logits.shape)} and {tuple(teacher.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    dtype = torch.promote_types(logits.dtype, torch.float32)
    ours = F.log_softmax(logits.to(dtype) / temperature, dim=-1)
    target = F.log_softmax(teacher.detach().to(dtype) / temperature, dim=-1)
    return temperature**2 * (target.exp() * (target - ours)).sum(-1).mean()
