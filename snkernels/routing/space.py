"""The two-way stitching space of SN-Netv2 (ECCV 2024), for any pair of depths.

Two anchors, small (S) and large (L), are cut at matching relative depths. A route starts in one
anchor and may change to the other at up to two of these cuts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

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

    Raises:
        TypeError: A depth is not an int.
        ValueError: A depth is below 1.
    """

    small_depth: int
    large_depth: int

    def __post_init__(self) -> None:
        for name, depth in (("small_depth", self.small_depth), ("large_depth", self.large_depth)):
            if not isinstance(depth, int):
                raise TypeError(f"{name} must be an int, got {depth!r}")
            if depth < 1:
                raise ValueError(f"{name} must be at least 1, got {depth}")

    @cached_property
    def cuts(self) -> tuple[tuple[int, int], ...]:
        """Boundaries (of S, of L) that cut k = 1 … C pairs; boundary p lies after p blocks.

        The shallower anchor is cut after every block, the deeper one at the nearest boundary in
        relative depth (halves up). The last cut is the end of both anchors; no route crosses there.
        """
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

    @cached_property
    def routes(self) -> tuple[Route, ...]:
        """Every route, in the order of ids."""
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

    @cached_property
    def _by_id(self) -> dict[int, Route]:
        return {route.id: route for route in self.routes}

    def route(self, route_id: int) -> Route:
        """Returns the route of this id.

        Raises:
            ValueError: No route has this id; the message names the ids that exist.
        """
        try:
            return self._by_id[route_id]
        except KeyError:
            skipped, last = len(self.cuts) + 1, self.routes[-1].id
            valid = f"0–{skipped - 1}" + (f" or {skipped + 1}–{last}" if last > skipped else "")
            raise ValueError(f"route id must be in {valid}, got {route_id!r}") from None

    def __len__(self) -> int:
        return len(self.routes)

    def __iter__(self) -> Iterator[Route]:
        return iter(self.routes)
