"""The plan: one schedule of calls that serves any mixture of (sample, route) pairs.

Every route moves forward in relative depth, so one walk over the cuts serves all routes: between
two cuts, an anchor runs its blocks on all rows that are in it; at a cut, all rows that change over
in one direction go through the one stitch that is there. Routes of one sample share a row for as
long as they have taken the same path.

A plan works on numbered values. A value is a batch of rows, each the tokens of one sample:

* `Embed` makes a value from images, `Blocks` advances a value in place;
* `Switch` makes a value from consecutive rows of another, and takes that one away if it says so;
* `Gather` makes a value from pieces of others and takes those away;
* `Readout` takes a value away and gives one output per row.

Calls and pieces whose rows serve only routes that nobody differentiates are not `graded`.

The outputs of all readouts, in order, are rows that `Plan.order` brings into the caller's order.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from snkernels.routing.space import LARGE, SMALL, Route, Stitch, StitchingSpace


@dataclass(frozen=True)
class Rows:
    """Rows ``start`` to ``stop - 1`` of a value."""

    value: int
    start: int
    stop: int
    graded: bool = True


@dataclass(frozen=True)
class Embed:
    """``out`` = the embedding of these samples; ``samples`` is a range where they are in a row."""

    anchor: int
    samples: Sequence[int]
    out: int
    graded: bool = True


@dataclass(frozen=True)
class Blocks:
    """Blocks ``start`` to ``stop - 1`` on all rows of ``value``, in place."""

    anchor: int
    start: int
    stop: int
    value: int
    graded: bool = True


@dataclass(frozen=True)
class Switch:
    """``out`` = the stitch of ``rows``. Block ``block`` of the other anchor is next for them.

    ``last`` tells that the value of ``rows`` is not needed any more.
    """

    stitch: Stitch
    block: int
    rows: Rows
    out: int
    last: bool
    graded: bool = True


@dataclass(frozen=True)
class Gather:
    """``out`` = the pieces, one after the other. Block ``block`` of ``anchor`` is next for them.

    The values of the pieces are not needed any more.
    """

    anchor: int
    block: int
    pieces: tuple[Rows, ...]
    out: int


@dataclass(frozen=True)
class Readout:
    """One output for each row of ``value``, which is not needed any more."""

    anchor: int
    value: int


Call = Embed | Blocks | Switch | Gather | Readout


@dataclass(frozen=True)
class Plan:
    """Calls to make, and where their outputs go.

    Attributes:
        calls: To be made in this order.
        order: For each of the caller's rows the number of its output, counted over all readouts;
            equal to ``range(len(order))`` where there is nothing to reorder.
        peak_rows: Most rows that exist while blocks run, those that wait included. A switch or
            gather holds, for its moment, the rows before and after it.
    """

    calls: tuple[Call, ...]
    order: Sequence[int]
    peak_rows: int


def plan(
    rows: Iterable[tuple[int, Route]],
    space: StitchingSpace,
    max_rows: int | None = None,
    without_grad: Iterable[int] = (),
) -> Plan:
    """Plans the run of each sample on its route.

    A row is computed once for all routes of its sample that have the same path so far, whatever
    ``max_rows`` is. Without a limit, all rows advance together. Under a limit, rows advance
    together where everything they lead to fits; elsewhere the rows that leave an anchor run to the
    end while the rows that stay wait, and samples that do not fit follow in a chunk of their own.
    Plans are cached.

    Args:
        rows: Pairs of the index of a sample and its route. Pairs may repeat.
        space: The space of the routes.
        max_rows: Upper bound of `Plan.peak_rows`. 3 is always enough: a row, and one left waiting
            at each of its two switches.
        without_grad: Ids of routes whose outputs nobody differentiates.

    Raises:
        ValueError: ``rows`` is empty or holds a negative index or a route of another space, or
            ``max_rows`` is too small for these routes.
        TypeError: A sample index is not an integer.
    """
    signature = []
    for sample, route in rows:
        index = operator.index(sample)
        if index < 0:
            raise ValueError(f"rows must hold sample indices of 0 or more, got {index}")
        if space.route(route.id) != route:
            raise ValueError(f"rows must hold routes of {space}, got route {route.id}: {route}")
        signature.append((index, route.id))
    if not signature:
        raise ValueError("rows must hold at least one (sample, route) pair, got none")
    return _plan(tuple(signature), space, max_rows, frozenset(without_grad))


# What a route has still to do: the cuts where it changes over, ended by the last cut; and its id.
_Tail = tuple[tuple[int, ...], int]


class _Row(NamedTuple):
    """A sample at one point of its way, with the routes that go on from there, sorted."""

    sample: int
    tails: tuple[_Tail, ...]

    @property
    def departures(self) -> tuple[int, ...]:
        """When the row next leaves its anchor, then when what left leaves again, and so on."""
        return self.tails[0][0]

    def split(self, cut: int) -> tuple[_Row | None, _Row | None]:
        """The row that leaves at ``cut`` and the row that stays."""
        leave = tuple((cuts[1:], route) for cuts, route in self.tails if cuts[0] == cut)
        stay = self.tails[len(leave) :]
        return (
            _Row(self.sample, leave) if leave else None,
            _Row(self.sample, stay) if stay else None,
        )

    def need(self, end: int) -> int:
        """Most rows at a time if this one runs by itself and rows that leave go first."""
        cut = self.departures[0]
        if cut == end:
            return 1
        leave, stay = self.split(cut)
        assert leave is not None
        if stay is None:
            return leave.need(end)
        return max(leave.need(end) + 1, stay.need(end))


class _Live(NamedTuple):
    """A value of one anchor and its rows, those that leave soonest last."""

    value: int
    rows: list[_Row]


def _leaves(live: Iterable[list[_Row]]) -> int:
    return sum(len(row.tails) for rows in live for row in rows)


def _sequence(indices: Iterable[int]) -> Sequence[int]:
    """The indices as a range where they count up by one, as a tuple elsewhere."""
    indices = tuple(indices)
    counting = range(indices[0], indices[0] + len(indices))
    return counting if indices == tuple(counting) else indices


class _Planner:
    def __init__(self, space: StitchingSpace, without_grad: frozenset[int]) -> None:
        self.without_grad = without_grad
        self.bounds = ((0, 0), *space.cuts)
        self.end = len(space.cuts)
        self.calls: list[Call] = []
        self.outputs: dict[tuple[int, int], int] = {}
        self.peak_rows = 0
        self._sizes: list[int] = []
        self._alive: set[int] = set()
        # Where a run of blocks of a value can still grow: nothing has read the value since.
        self._growing: dict[int, int] = {}

    def embed(self, anchor: int, rows: list[_Row]) -> _Live:
        rows = sorted(rows, key=lambda row: row.departures, reverse=True)
        out = self._new(len(rows))
        samples = _sequence(row.sample for row in rows)
        self.calls.append(Embed(anchor, samples, out, self._graded(rows)))
        return _Live(out, rows)

    def run(self, live: dict[int, _Live], cut: int, room: int) -> None:
        """Plans the live rows from ``cut`` to their outputs, on at most ``room`` rows at a time.

        Either everything the rows lead to fits in the room, or they are all in one anchor.
        """
        while True:
            for anchor, of_anchor in live.items():
                self._blocks(anchor, cut, of_anchor)
            cut += 1
            if cut == self.end:
                break
            before, live = live, self._cross(live, cut)
            if len(live) == 2 and _leaves(rows for _, rows in live.values()) > room:
                (origin,) = before
                stayed = live.pop(origin)
                self.run(live, cut, room - len(stayed.rows))
                live = {origin: stayed}
        for anchor, (value, rows) in live.items():
            self._read(value)
            self.calls.append(Readout(anchor, value))
            for row in rows:
                ((_, route),) = row.tails
                self.outputs[row.sample, route] = len(self.outputs)

    def _new(self, size: int) -> int:
        self._sizes.append(size)
        self._alive.add(len(self._sizes) - 1)
        return len(self._sizes) - 1

    def _read(self, value: int, last: bool = True) -> None:
        self._growing.pop(value, None)
        if last:
            self._alive.discard(value)

    def _graded(self, rows: Iterable[_Row]) -> bool:
        return any(route not in self.without_grad for row in rows for _, route in row.tails)

    def _blocks(self, anchor: int, cut: int, live: _Live) -> None:
        value = live.value
        self.peak_rows = max(self.peak_rows, sum(self._sizes[v] for v in self._alive))
        stop = self.bounds[cut + 1][anchor]
        if value in self._growing:
            call = self.calls[self._growing[value]]
            assert isinstance(call, Blocks)
            self.calls[self._growing[value]] = replace(call, stop=stop)
        else:
            self._growing[value] = len(self.calls)
            start, graded = self.bounds[cut][anchor], self._graded(live.rows)
            self.calls.append(Blocks(anchor, start, stop, value, graded))

    def _cross(self, live: dict[int, _Live], cut: int) -> dict[int, _Live]:
        """Plans all changes of anchor at ``cut``."""
        # For each anchor the rows it has after the cut, each with its value and its place there.
        arrived: dict[int, list[tuple[_Row, int, int]]] = {SMALL: [], LARGE: []}
        stayed: dict[int, list[tuple[_Row, int, int]]] = {SMALL: [], LARGE: []}
        for anchor, (value, rows) in live.items():
            leaving = []
            for i, (leave, stay) in enumerate(row.split(cut) for row in rows):
                if leave:
                    leaving.append(leave)
                if stay:
                    stayed[anchor].append((stay, value, i))
            if leaving:
                last = not stayed[anchor]
                out = self._new(len(leaving))
                self._read(value, last)
                # Rows are ordered so that those that leave are the last ones.
                source = Rows(value, len(rows) - len(leaving), len(rows))
                block = self.bounds[cut][1 - anchor]
                stitch, graded = Stitch(anchor, cut - 1), self._graded(leaving)
                self.calls.append(Switch(stitch, block, source, out, last, graded))
                arrived[1 - anchor] = [(row, out, i) for i, row in enumerate(leaving)]
        return {
            anchor: self._gather(anchor, cut, arrived[anchor] + stayed[anchor])
            for anchor in (SMALL, LARGE)
            if arrived[anchor] or stayed[anchor]
        }

    def _gather(self, anchor: int, cut: int, parts: list[tuple[_Row, int, int]]) -> _Live:
        parts.sort(key=lambda part: part[0].departures, reverse=True)
        rows = [row for row, _, _ in parts]
        pieces: list[Rows] = []
        for row, value, i in parts:
            graded, before = self._graded([row]), pieces[-1] if pieces else None
            if before and (before.value, before.stop, before.graded) == (value, i, graded):
                pieces[-1] = replace(before, stop=i + 1)
            else:
                pieces.append(Rows(value, i, i + 1, graded))
        # A whole value in its order stays what it is.
        value = parts[0][1]
        if [place for _, *place in parts] == [[value, i] for i in range(self._sizes[value])]:
            return _Live(value, rows)
        for piece in pieces:
            self._read(piece.value)
        out = self._new(len(rows))
        self.calls.append(Gather(anchor, self.bounds[cut][anchor], tuple(pieces), out))
        return _Live(out, rows)


def _chunks(
    starts: dict[int, dict[int, _Row]], end: int, max_rows: int
) -> Iterator[list[dict[int, _Row]]]:
    """Samples that can run together within ``max_rows``, each as its first row in each anchor."""
    chunk: list[dict[int, _Row]] = []
    used = 0
    for sample in sorted(starts):
        need = max(row.need(end) for row in starts[sample].values())
        if need > max_rows:
            raise ValueError(
                f"max_rows must be at least {need} for the routes of sample {sample},"
                f" got {max_rows}"
            )
        if used + need > max_rows:
            yield chunk
            chunk, used = [], 0
        chunk.append(starts[sample])
        used += need
    yield chunk


@lru_cache(maxsize=512)
def _plan(
    signature: tuple[tuple[int, int], ...],
    space: StitchingSpace,
    max_rows: int | None,
    without_grad: frozenset[int],
) -> Plan:
    planner = _Planner(space, without_grad)
    tails: dict[int, dict[int, list[_Tail]]] = {}
    for sample, route_id in dict.fromkeys(signature):
        route = space.route(route_id)
        cuts = (*(stitch.index + 1 for stitch in route.stitches), planner.end)
        anchors = tails.setdefault(sample, {})
        anchors.setdefault(route.segments[0].anchor, []).append((cuts, route_id))
    starts = {
        sample: {anchor: _Row(sample, tuple(sorted(tails))) for anchor, tails in anchors.items()}
        for sample, anchors in tails.items()
    }
    room = len(signature) if max_rows is None else max_rows
    for chunk in _chunks(starts, planner.end, room):
        first = {
            anchor: [rows[anchor] for rows in chunk if anchor in rows] for anchor in (SMALL, LARGE)
        }
        first = {anchor: rows for anchor, rows in first.items() if rows}
        if _leaves(first.values()) <= room:
            planner.run({a: planner.embed(a, rows) for a, rows in first.items()}, 0, room)
        else:
            for anchor, rows in first.items():
                planner.run({anchor: planner.embed(anchor, rows)}, 0, room)
    order = _sequence(planner.outputs[pair] for pair in signature)
    return Plan(tuple(planner.calls), order, planner.peak_rows)
