"""Which route a budget buys, and why that one."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from snkernels.integers import integer
from snkernels.models.model_route import ModelRoute
from snkernels.models.setting import setting_of
from snkernels.routing.budget import Budget
from snkernels.routing.space import LARGE, StitchingSpace

if TYPE_CHECKING:
    from snkernels.models.stitched import StitchedViT


@dataclass(frozen=True)
class Offer:
    """A route, its score, and what it costs in the kind of a budget."""

    route: ModelRoute
    score: float
    cost: float


@dataclass(frozen=True)
class Selection:
    """The best-scoring route that a budget buys. ``str`` says which and why in a sentence.

    Attributes:
        chosen: The best; among equals the cheapest.
        budget: What could be spent.
        batch_size: Images of the call that a budget of time is for; None for other budgets.
        fitting: How many routes with a score fit the budget.
        scored: How many routes have a score.
        better: The cheapest of the routes that score more; None where none does.
    """

    chosen: Offer
    budget: Budget
    batch_size: int | None
    fitting: int
    scored: int
    better: Offer | None

    @property
    def route(self) -> ModelRoute:
        """The chosen route."""
        return self.chosen.route

    @property
    def score(self) -> float:
        """Its score."""
        return self.chosen.score

    @property
    def cost(self) -> float:
        """Its cost, of the budget's kind: a share, multiply-adds, or seconds."""
        return self.chosen.cost

    def __str__(self) -> str:
        at_batch = "" if self.batch_size is None else f" at batch {self.batch_size}"
        next_one = "no scored route is better"
        if self.better is not None:
            next_one = f"the next better one is {self._name(self.better)}"
        return (
            f"{self._name(self.chosen)}{at_batch}: the best of {self.fitting} routes within "
            f"{self.budget}, of {self.scored} with a score; {next_one}."
        )

    def _name(self, offer: Offer) -> str:
        cost = self.budget.of(offer.cost)
        return f"route {offer.route.id} ({offer.route}), score {offer.score:.4g}, for {cost}"


def select(model: StitchedViT, budget: float | str | Budget, batch_size: int = 1) -> Selection:
    """Choose the best of a model's routes that a budget buys; see ``StitchedViT.select``."""
    budget, batch_size = Budget.parse(budget), integer("batch_size", batch_size, 1)
    scores = model.scores
    if scores is None:
        raise RuntimeError(
            "scores must be set before a budget can pick a route: "
            "model.scores = snkernels.evaluate(model, loader)"
        )
    scored = [route for route in model.routes if route.id in scores]
    if budget.kind == "seconds":
        if model.profile is None:
            raise RuntimeError(
                "profile must be set before a budget of time can pick a route: "
                "model.profile = snkernels.profile(model, batch_sizes)"
            )
        model.profile.check_setting(setting_of(model))
        costs = [model.profile.seconds(route, batch_size) for route in scored]
    else:
        whole = model.routes[LARGE].flops if budget.kind == "share" else 1
        costs = [route.flops / whole for route in scored]
    offers = [
        Offer(route, scores[route.id], cost) for route, cost in zip(scored, costs, strict=True)
    ]
    return choose(offers, budget, batch_size if budget.kind == "seconds" else None)


def choose(offers: Sequence[Offer], budget: Budget, batch_size: int | None) -> Selection:
    """Choose the best offer within a budget.

    Args:
        offers: One per route that has a score.
        budget: What can be spent.
        batch_size: For the message.

    Raises:
        ValueError: If nothing fits; the message names the cheapest route and its cost.
    """
    fitting = [offer for offer in offers if offer.cost <= budget.amount]
    if not fitting:
        cheapest = min(offers, key=lambda offer: offer.cost)
        raise ValueError(
            f"budget must reach for a route, and {budget} reaches for none: the cheapest with a "
            f"score, route {cheapest.route.id} ({cheapest.route}), costs {budget.of(cheapest.cost)}"
        )
    chosen = max(fitting, key=lambda offer: (offer.score, -offer.cost))
    better = [offer for offer in offers if offer.score > chosen.score]
    return Selection(
        chosen,
        budget,
        batch_size,
        len(fitting),
        len(offers),
        min(better, key=lambda offer: (offer.cost, -offer.score), default=None),
    )


def check_scores(scores: Any, space: StitchingSpace) -> dict[int, float]:
    """Return scores as a dict from route ids to numbers.

    Args:
        scores: A mapping, or an evaluation, whose top-1 is taken.
        space: Whose routes they are of.

    Raises:
        TypeError: If it is neither, an id is no integer, or a score no number.
        ValueError: If it is empty, no route has an id, or a score is not finite.
    """
    if not isinstance(scores, Mapping):
        try:
            scores = {score.id: score.top1 for score in scores.scores}
        except AttributeError:
            raise TypeError(
                "scores must be an evaluation or a mapping from route ids to scores, "
                f"got {type(scores).__name__}"
            ) from None
    if not scores:
        raise ValueError("scores must hold at least one route, got none")
    checked = {}
    for route_id, score in scores.items():
        route = space.route(route_id)
        if not isinstance(score, numbers.Real):
            raise TypeError(f"scores must be numbers, got {score!r} for route {route.id}")
        if not math.isfinite(score):
            raise ValueError(f"scores must be finite, got {score} for route {route.id}")
        checked[route.id] = float(score)
    return checked
