"""Resource-constrained sampling of SN-Netv2: which route a training step runs.

Routes of about equal cost form a group. A draw takes a group, then one of its routes uniformly, so
that the two anchors, alone in their groups, are drawn far more often than any stitched route.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

from snkernels.integers import integer
from snkernels.routing.space import LARGE, SMALL

Draws: TypeAlias = Literal["own", "shared", "equal_cost"]
"""How the routes that data-parallel ranks draw at one step relate; see `RouteSampler`."""


def cost_groups(flops: Mapping[int, int], gap: float) -> list[list[int]]:
    """Groups route ids by cost, cheapest group and cheapest route first.

    Args:
        flops: Cost of each route id.
        gap: A route that costs more than ``gap`` above the first route of its group opens the next
            group. Same unit as ``flops``; the paper uses 1e9 for classification and 1e10 for dense
            prediction.

    Raises:
        ValueError: ``flops`` is empty or ``gap`` is negative or NaN.
    """
    if not flops:
        raise ValueError("flops must name at least one route, got an empty mapping")
    if not gap >= 0:
        raise ValueError(f"gap must be zero or more, got {gap}")
    groups: list[list[int]] = []
    for route_id in sorted(flops, key=lambda i: (flops[i], i)):
        if not groups or flops[route_id] - flops[groups[-1][0]] > gap:
            groups.append([])
        groups[-1].append(route_id)
    return groups


def default_gap(flops: Mapping[int, int]) -> float:
    """A gap that suits any pair of anchors: half of (cost of L - cost of S) / C.

    Moving a switch by one cut changes the cost of a route by about (cost of L - cost of S) / C,
    so routes cluster at that spacing, and half of it separates the clusters. For DeiT3 S-B, S-L
    and B-L this gives the same groups as the paper's 1 GFLOP.

    Args:
        flops: Cost of every route of one stitching space.

    Raises:
        ValueError: ``flops`` does not hold a whole space, so that C cannot be told from it.
    """
    # A space of C cuts has C² - C + 2 routes, numbered in a row without C + 1.
    cuts = (1 + math.isqrt(max(4 * len(flops) - 7, 0))) // 2
    if len(flops) < 2 or set(flops) != set(range(len(flops) + 1)) - {cuts + 1}:
        raise ValueError(
            f"flops must hold every route of a stitching space, got {len(flops)} routes;"
            " name a gap to sample from some of them"
        )
    return abs(flops[LARGE] - flops[SMALL]) / cuts / 2


class RouteSampler:
    """Draws route ids, from a random generator of its own.

    Draw number n depends on the seed, the rank and n only. So the state of a sampler is two
    integers and the same for all ranks: a checkpoint that one rank wrote resumes every rank, each
    with its own draws.

    Args:
        flops: Cost of each route id that may be drawn.
        gap: See `cost_groups`; None takes `default_gap`.
        tilt: Draw costly groups more often: with k groups, group i = 1 … k by rising cost has a
            probability proportional to i/k + 1/k. Otherwise all groups are equally likely.
        seed: Seed of the draws.
        rank: Data-parallel rank, or what tells it when a route is drawn; it may be set later, as an
            attribute.
        draws: "own": every rank draws a route of its own. "shared": all ranks draw the same route
            at each step. "equal_cost": all ranks draw the same group, and each its own route in
            it, so that no rank waits for one with a costlier route.

    Raises:
        TypeError: ``seed`` is no integer.
        ValueError: ``draws`` is none of these; see also `cost_groups` and `default_gap`.
    """

    def __init__(
        self,
        flops: Mapping[int, int],
        gap: float | None = None,
        *,
        tilt: bool = False,
        seed: int = 0,
        rank: int | Callable[[], int] = 0,
        draws: Draws = "own",
    ) -> None:
        if draws not in get_args(Draws):
            raise ValueError(f"draws must be one of {', '.join(get_args(Draws))}, got {draws!r}")
        self.groups = cost_groups(flops, default_gap(flops) if gap is None else gap)
        self._weights = [i + 1 if tilt else 1 for i in range(1, len(self.groups) + 1)]
        self.rank = rank
        self._relation = draws
        self._seed = integer("seed", seed)
        self._draws = 0

    def draw(self) -> int:
        """Returns the route id of the next step."""
        # A text seed is hashed in full, so that neighbouring draws are unrelated.
        rank = self.rank() if callable(self.rank) else self.rank
        own, relation = f"rank {rank}", self._relation
        group_stream = own if relation == "own" else "shared"
        route_stream = "shared" if relation == "shared" else own
        generators = {
            stream: random.Random(f"{self._seed}, {stream}, {self._draws}")
            for stream in (group_stream, route_stream)
        }
        self._draws += 1
        (group,) = generators[group_stream].choices(self.groups, self._weights)
        return generators[route_stream].choice(group)

    def probabilities(self) -> dict[int, float]:
        """Returns the probability of each route id, in the order of the groups."""
        total = sum(self._weights)
        return {
            route_id: weight / total / len(group)
            for group, weight in zip(self.groups, self._weights, strict=True)
            for route_id in group
        }

    def state_dict(self) -> dict[str, int]:
        """Returns the seed and the number of draws so far. It can be written as JSON."""
        return {"seed": self._seed, "draws": self._draws}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continues from a state that `state_dict` gave, on any rank.

        Raises:
            ValueError: ``state`` is not such a state; the sampler stays as it was.
        """
        if set(state) != {"seed", "draws"} or not all(isinstance(v, int) for v in state.values()):
            raise ValueError(f"state must hold the ints seed and draws, got {dict(state)!r}")
        if state["draws"] < 0:
            raise ValueError(f"draws must be zero or more, got {state['draws']}")
        self._seed, self._draws = state["seed"], state["draws"]
