"""Training several routes per step, in one pass, and towards the large anchor's logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snkernels.integers import integer
from snkernels.models.wrappers import inside
from snkernels.routing.space import LARGE


class Step(NamedTuple):
    """What ``training_loss`` computed.

    Attributes:
        loss: A scalar to call ``backward`` on.
        routes: Ids of the routes that were drawn; one may come twice.
        logits: Their logits (routes, batch, classes).
    """

    loss: Tensor
    routes: list[int]
    logits: Tensor


def training_loss(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    routes_per_step: int = 1,
    criterion: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy,
    distillation: float = 0.0,
    temperature: float = 1.0,
) -> Step:
    """Draw routes for one training step, run them in one pass and average their losses.

    What the routes begin with in common is computed once, and the gradients are the mean of what a
    step of each route would give::

        snkernels.training_loss(model, images, labels, routes_per_step=4).loss.backward()

    Args:
        model: A ``StitchedViT``, or ``DistributedDataParallel`` or ``torch.compile`` around one.
        images: (batch, channels, height, width).
        labels: What ``criterion`` compares logits with, its first dimension the batch: classes
            (batch,), or probabilities (batch, classes) as CutMix makes them.
        routes_per_step: How many routes are drawn, each as a step alone would draw it.
        criterion: Maps the logits (batch, classes) of one route and ``labels`` to a scalar.
        distillation: Weight of ``distillation_loss`` towards the large anchor, in [0, 1]; the
            criterion keeps the rest.  Above 0 the large anchor runs in the same pass, drawn or not,
            and learns nothing from being a teacher: what only it runs has no gradient.
        temperature: See ``distillation_loss``.

    Returns:
        The loss, the ids that were drawn, and their logits.

    Raises:
        TypeError: If ``model`` is something else.
        ValueError: If a number is out of its range, or images and labels are not equally many or
            do not suit the model or the criterion.  Nothing counts as drawn then.
    """
    routes_per_step = integer("routes_per_step", routes_per_step, 1)
    if not 0.0 <= distillation <= 1.0:
        raise ValueError(f"distillation must be in [0, 1], got {distillation}")
    _check_temperature(temperature)
    if len(labels) != len(images):
        raise ValueError(
            f"labels must be as many as images, got {len(labels)} for {len(images)} images"
        )
    inner = inside(model)
    before = inner.sampler.state_dict()
    try:
        drawn = inner.draw(routes_per_step)
        if distillation and LARGE not in drawn:
            every = model(images, routes=[*drawn, LARGE], without_grad=[LARGE])
            logits, teacher = every[:-1], every[-1]
        else:
            logits = model(images, routes=drawn)
            teacher = logits[drawn.index(LARGE)] if distillation else None
        loss = torch.stack([criterion(route, labels) for route in logits]).mean()
        if teacher is not None:
            towards = distillation_loss(logits, teacher, temperature)
            loss = (1.0 - distillation) * loss + distillation * towards
    except BaseException:
        inner.sampler.load_state_dict(before)
        raise
    return Step(loss, drawn, logits)


def distillation_loss(logits: Tensor, teacher: Tensor, temperature: float = 1.0) -> Tensor:
    """Return how far routes are from a teacher: the mean over routes and images of T² · KL.

    The teacher gets no gradient.

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
    _check_temperature(temperature)
    dtype = torch.promote_types(logits.dtype, torch.float32)
    ours = F.log_softmax(logits.to(dtype) / temperature, dim=-1)
    target = F.log_softmax(teacher.detach().to(dtype) / temperature, dim=-1)
    return temperature**2 * (target.exp() * (target - ours)).sum(-1).mean()


def _check_temperature(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
