"""The two-way stitching space of SN-Netv2 (ECCV 2024), for any pair of depths.

Two anchors, small (S) and large (L), are cut at matching relative depths. A route starts in one
anchor and may change to the other at up to two of these cuts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

from snkernels.integers import integer, is_one

SMALL, LARGE = 0, 1
"""Indices of the anchors."""

S2L, L2S = 0, 1
"""Directions of a stitch; a stitch of direction d starts in anchor d and ends in anchor 1 - d."""

ANCHOR_NAMES = "SL"


@dataclass(frozen=True)
class Segment:
    """Consecutive blocks ``start`` to ``stop - 1`` of one anchor."""

    anchor: int
    start: int
    stop: int

    def __str__(self) -> str:
        last = self.stop - 1
        blocks = f"{self.start}" if last == self.start else f"{self.start}–{last}"
        return f"{ANCHOR_NAMES[self.anchor]}{blocks}"


@dataclass(frozen=True)
class Stitch:
    """One stitching layer: ``direction`` S2L or L2S, ``index`` its place among those.

    The layer at cut k has index k - 1, and every route that crosses there shares it.
    """

    direction: int
    index: int


@dataclass(frozen=True)
class Route:
    """A path through the anchors: ``stitches[i]`` leads from ``segments[i]`` to the next."""

    id: int
    segments: tuple[Segment, ...]
    stitches: tuple[Stitch, ...]

    @property
    def direction(self) -> str:
        """The anchors in the order of the route: ``"S"``, ``"L"``, ``"S→L"``, … ``"S→L→S"``."""
        return "→".join(ANCHOR_NAMES[segment.anchor] for segment in self.segments)

    def __str__(self) -> str:
        return " → ".join(map(str, self.segments))


@dataclass(frozen=True)
class StitchingSpace:
    """All routes between an anchor of ``small_depth`` blocks and one of ``large_depth`` blocks.

    Ids, with C = min(small_depth, large_depth) and cuts 1 to C - 1:

    ====================  ====================================================
    0, 1                  S alone, L alone
    2 … C                 S→L at cut 1 … C - 1
    C + 1                 numbered, never offered: all of S, then only L's norm and head
    then                  L→S at cut 1 … C - 1
    then                  L→S→L at every pair of cuts a < b, in lexicographic order
    then                  S→L→S likewise
    ====================  ====================================================

    For depth ratios 1 and 2 these are the ids of the official release: for depths (12, 12) and
    (12, 24), 134 routes with ids 0 to 134 without 13. Two spaces of equal depths are equal.

    Attributes:
        small_depth: Number of blocks of the small anchor.
        large_depth: Number of blocks of the large anchor.
        cuts: Boundaries (of S, of L) that cut k = 1 … C pairs; boundary p lies after p blocks. The
            shallower anchor is cut after every block, the deeper one at the nearest boundary in
            relative depth (halves up). The last cut is the end of both anchors; no route crosses
            there.
        routes: Every route, in the order of ids.

    Raises:
        TypeError: A depth is no integer.
        ValueError: A depth is below 1.
    """

    small_depth: int
    large_depth: int
    cuts: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)
    routes: tuple[Route, ...] = field(init=False, repr=False, compare=False)
    _by_id: dict[int, Route] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, depth in (("small_depth", self.small_depth), ("large_depth", self.large_depth)):
            object.__setattr__(self, name, integer(name, depth, 1))
        # Not when first asked for: torch.compile does not get past the lock that this would take.
        object.__setattr__(self, "cuts", self._cuts())
        object.__setattr__(self, "routes", self._routes())
        object.__setattr__(self, "_by_id", {route.id: route for route in self.routes})

    def _cuts(self) -> tuple[tuple[int, int], ...]:
        count = min(self.small_depth, self.large_depth)

        def nearest(k: int, depth: int) -> int:
            return (2 * k * depth + count) // (2 * count)

        return tuple(
            (nearest(k, self.small_depth), nearest(k, self.large_depth))
            for k in range(1, count + 1)
        )

    @property
    def num_stitches(self) -> tuple[int, int]:
        """Number of S2L and of L2S layers: (C, C - 1).

        The extra S2L layer stands at the end of S. Dense prediction uses it to give S's last tap
        L's width.
        """
        return len(self.cuts), len(self.cuts) - 1

    def _routes(self) -> tuple[Route, ...]:
        inner = range(1, len(self.cuts))
        pairs = list(combinations(inner, 2))
        paths: list[tuple[int, tuple[int, ...]] | None] = [
            (SMALL, ()),
            (LARGE, ()),
            *((SMALL, (k,)) for k in inner),
            None,
            *((LARGE, (k,)) for k in inner),
            *((LARGE, pair) for pair in pairs),
            *((SMALL, pair) for pair in pairs),
        ]
        return tuple(self._build(i, *path) for i, path in enumerate(paths) if path is not None)

    def _build(self, route_id: int, anchor: int, crossings: tuple[int, ...]) -> Route:
        segments, stitches = [], []
        start = 0
        for k in crossings:
            segments.append(Segment(anchor, start, self.cuts[k - 1][anchor]))
            stitches.append(Stitch(direction=anchor, index=k - 1))
            anchor = 1 - anchor
            start = self.cuts[k - 1][anchor]
        segments.append(Segment(anchor, start, self.cuts[-1][anchor]))
        return Route(route_id, tuple(segments), tuple(stitches))

    def route(self, route_id: int) -> Route:
        """Returns the route of this id.

        Raises:
            TypeError: The id is no integer.
            ValueError: No route has this id; the message names the ids that exist.
        """
        route_id = integer("route id", route_id)
        try:
            return self._by_id[route_id]
        except KeyError:
            skipped, last = len(self.cuts) + 1, self.routes[-1].id
            valid = f"0–{skipped - 1}" + (f" or {skipped + 1}–{last}" if last > skipped else "")
            raise ValueError(f"route id must be in {valid}, got {route_id!r}") from None

    def named(self, ids: Literal["all"] | Iterable[int], name: str) -> list[Route]:
        """Returns the routes of these ids, in the order given, or all routes.

        Args:
            ids: Ids, which may repeat, or "all".
            name: What the caller calls them; errors name them so.

        Raises:
            TypeError: ``ids`` is one value, or one of them is no integer.
            ValueError: No route has one of the ids, there are none, or it is another text.
        """
        if isinstance(ids, str) and ids == "all":
            return list(self.routes)
        if is_one(ids):
            kind = ValueError if isinstance(ids, str) else TypeError
            raise kind(f'{name} must be "all" or route ids, got {ids!r:.80}')
        routes = [self.route(route_id) for route_id in ids]
        if not routes:
            raise ValueError(f"{name} must name at least one route, got none")
        return routes

    def __len__(self) -> int:
        return len(self.routes)

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)
