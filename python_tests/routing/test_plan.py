from collections import Counter
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from snkernels.routing.cost import (
    ViTShape,
    block_flops,
    embed_flops,
    head_flops,
    route_flops,
    stitch_flops,
)
from snkernels.routing.plan import Blocks, Call, Embed, Gather, Plan, Readout, Rows, Switch, plan
from snkernels.routing.space import S2L, Route, Stitch, StitchingSpace

# A row of the toy model is the history of everything that was done to it.
Step = tuple[str, int, int]
History = tuple[Step, ...]
SPACE = StitchingSpace(12, 24)


def alone(sample: int, route: Route) -> History:
    history: list[Step] = [("embed", route.segments[0].anchor, sample)]
    for i, segment in enumerate(route.segments):
        if i > 0:
            stitch = route.stitches[i - 1]
            history.append(("stitch", stitch.direction, stitch.index))
        history += [("block", segment.anchor, b) for b in range(segment.start, segment.stop)]
    return (*history, ("read", route.segments[-1].anchor, 0))


class Toy:
    """Runs a plan on histories and keeps books of what the plan did."""

    def __init__(self, schedule: Plan) -> None:
        self.values: dict[int, list[History]] = {}
        self.done: list[History] = []  # every row that any call made
        self.block_calls = 0
        self.peak_rows = 0
        self.outputs: list[History] = []
        # For rows that are on their way into a block: which one the plan announced.
        self.announced: dict[int, tuple[int, int]] = {}
        for call in schedule.calls:
            self.make(call)
        assert not self.values, "a value was never taken away"
        self.result = [self.outputs[i] for i in schedule.order]

    def extend(self, rows: Sequence[History], *step: tuple[str, int, int]) -> list[History]:
        for one in step:
            rows = [(*row, one) for row in rows]
            self.done += rows
        return list(rows)

    def put(self, value: int, rows: list[History]) -> None:
        assert value not in self.values and rows
        self.values[value] = rows

    def make(self, call: Call) -> None:
        if isinstance(call, Embed):
            rows = [
                row for s in call.samples for row in self.extend([()], ("embed", call.anchor, s))
            ]
            self.put(call.out, rows)
        elif isinstance(call, Blocks):
            assert self.announced.pop(call.value, (call.anchor, call.start))[0] == call.anchor
            steps = [("block", call.anchor, b) for b in range(call.start, call.stop)]
            self.values[call.value] = self.extend(self.values[call.value], *steps)
            self.block_calls += len(steps)
            self.peak_rows = max(self.peak_rows, sum(map(len, self.values.values())))
        elif isinstance(call, Switch):
            rows = self.values.pop(call.rows.value) if call.last else self.values[call.rows.value]
            assert 0 <= call.rows.start < call.rows.stop <= len(rows)
            leaving = rows[call.rows.start : call.rows.stop]
            self.put(call.out, self.extend(leaving, ("stitch", *vars(call.stitch).values())))
            self.announced[call.out] = (1 - call.stitch.direction, call.block)
        elif isinstance(call, Gather):
            assert all(
                self.announced.pop(p.value, (call.anchor, call.block)) == (call.anchor, call.block)
                for p in call.pieces
            )
            rows = [r for p in call.pieces for r in self.values[p.value][p.start : p.stop]]
            for value in {p.value for p in call.pieces}:
                del self.values[value]
            self.put(call.out, rows)
            self.announced[call.out] = (call.anchor, call.block)
        else:
            self.outputs += self.extend(self.values.pop(call.value), ("read", call.anchor, 0))


@st.composite
def problems(draw: st.DrawFn) -> tuple[StitchingSpace, list[tuple[int, Route]], int | None]:
    space = StitchingSpace(draw(st.integers(1, 9)), draw(st.integers(1, 9)))
    shared = draw(st.lists(st.sampled_from(space.routes), max_size=12))
    samples = draw(st.lists(st.integers(0, 9), min_size=1, max_size=6))
    rows = [(sample, route) for sample in samples for route in shared]
    rows += draw(
        st.lists(
            st.tuples(st.integers(0, 9), st.sampled_from(space.routes)),
            min_size=0 if rows else 1,
            max_size=12,
        )
    )
    rows = draw(st.permutations(rows))
    return space, rows, draw(st.none() | st.integers(3, 40))


@settings(deadline=None, max_examples=400)
@given(problems())
def test_equals_each_route_alone(
    problem: tuple[StitchingSpace, list[tuple[int, Route]], int | None],
) -> None:
    space, rows, max_rows = problem
    schedule = plan(rows, space, max_rows)
    toy = Toy(schedule)
    assert toy.result == [alone(sample, route) for sample, route in rows]
    # Nothing is done twice: every step of every prefix once, whatever the limit.
    wanted = {
        history[:i]
        for history in map(alone, *zip(*rows, strict=True))
        for i in range(1, len(history) + 1)
    }
    assert Counter(toy.done) == Counter(wanted)
    assert toy.peak_rows == schedule.peak_rows
    assert schedule.peak_rows <= (len(set(rows)) if max_rows is None else max_rows)


class Graded(Toy):
    """Checks that gradients reach every step that needs them, and no call that needs none."""

    def __init__(self, schedule: Plan, needed: set[History]) -> None:
        self.needed = needed
        self.cut_off: set[History] = set()
        super().__init__(schedule)

    def make(self, call: Call) -> None:
        if isinstance(call, Gather):
            for piece in call.pieces:
                if not piece.graded:
                    self.cut_off.update(self.values[piece.value][piece.start : piece.stop])
        before = len(self.done)
        super().make(call)
        steps = self.done[before:]
        self.cut_off.update(step for step in steps if step[:-1] in self.cut_off)
        if isinstance(call, Embed | Blocks | Switch):
            assert call.graded == any(step in self.needed for step in steps)
        for step in steps:
            assert step not in self.needed or step not in self.cut_off


@settings(deadline=None, max_examples=200)
@given(problems(), st.data())
def test_gradients_stop_where_nobody_needs_them(
    problem: tuple[StitchingSpace, list[tuple[int, Route]], int | None], data: st.DataObject
) -> None:
    space, rows, max_rows = problem
    ids = sorted({route.id for _, route in rows})
    without_grad = data.draw(st.sets(st.sampled_from(ids)))
    schedule = plan(rows, space, max_rows, without_grad)
    needed = {
        history[:i]
        for history in (alone(s, route) for s, route in rows if route.id not in without_grad)
        for i in range(1, len(history) + 1)
    }
    assert Graded(schedule, needed).result == [alone(sample, route) for sample, route in rows]


@pytest.mark.parametrize("max_rows", [None, 4])
def test_one_route_is_the_loop_one_would_write(max_rows: int | None) -> None:
    for route in SPACE:
        calls: list[Call] = [Embed(route.segments[0].anchor, range(4), 0)]
        for i, segment in enumerate(route.segments):
            if i > 0:
                stitch = route.stitches[i - 1]
                calls.append(Switch(stitch, segment.start, Rows(i - 1, 0, 4), i, True))
            calls.append(Blocks(segment.anchor, segment.start, segment.stop, i))
        calls.append(Readout(route.segments[-1].anchor, len(route.segments) - 1))
        schedule = plan([(i, route) for i in range(4)], SPACE, max_rows)
        assert schedule == Plan(tuple(calls), range(4), 4), str(route)


def shape(width: int, depth: int) -> ViTShape:
    return ViTShape(embed_dim=width, depth=depth, tokens=197, patches=196, patch_size=16)


def multiply_adds(done: list[History], small: ViTShape, large: ViTShape) -> int:
    shapes = (small, large)
    cost = {}
    for anchor in (0, 1):
        cost["embed", anchor] = embed_flops(shapes[anchor])
        cost["block", anchor] = block_flops(shapes[anchor])
        cost["stitch", anchor] = stitch_flops(shapes[anchor], shapes[1 - anchor])
        cost["read", anchor] = head_flops(shapes[anchor])
    return sum(cost[history[-1][:2]] for history in done)


SMALL, BASE, LARGE = shape(384, 12), shape(768, 12), shape(1024, 24)


@pytest.mark.parametrize(
    ("small", "large", "block_calls", "saving"),
    [(SMALL, LARGE, 36, "2.70"), (SMALL, BASE, 24, "2.71"), (BASE, LARGE, 36, None)],
)
def test_whole_space_shares_prefixes(
    small: ViTShape, large: ViTShape, block_calls: int, saving: str | None
) -> None:
    space = StitchingSpace(small.depth, large.depth)
    batch = 3
    toy = Toy(plan([(s, route) for route in space for s in range(batch)], space))
    assert toy.block_calls == block_calls
    assert toy.peak_rows == 134 * batch
    separate = batch * sum(route_flops(route, small, large) for route in space)
    shared = multiply_adds(toy.done, small, large)
    assert shared % batch == 0
    if saving:
        assert f"{separate / shared:.2f}" == saving
    if (small, large) == (SMALL, LARGE):
        assert round(separate / batch / 1e9) == 4455
        assert round(shared / batch / 1e9) == 1650


def test_whole_space_moves_rows_in_few_pieces() -> None:
    schedule = plan([(s, route) for s in range(5) for route in SPACE], SPACE)
    counts = Counter(type(call).__name__ for call in schedule.calls)
    assert counts == {"Embed": 2, "Blocks": 24, "Switch": 22, "Gather": 22, "Readout": 2}
    assert max(len(c.pieces) for c in schedule.calls if isinstance(c, Gather)) == 4


def test_order_follows_the_caller() -> None:
    by_route = [(s, route) for route in SPACE for s in range(2)]
    by_sample = [(s, route) for s in range(2) for route in reversed(SPACE.routes)]
    for rows in (by_route, by_sample):
        assert Toy(plan(rows, SPACE)).result == [alone(*row) for row in rows]


@pytest.mark.parametrize("max_rows", [12, 13, 20, 44, 100, 268, 535, 536])
def test_limit_costs_no_arithmetic(max_rows: int) -> None:
    rows = [(s, route) for route in SPACE for s in range(4)]
    free, limited = Toy(plan(rows, SPACE)), Toy(plan(rows, SPACE, max_rows))
    assert limited.result == free.result
    assert Counter(limited.done) == Counter(free.done)
    assert limited.peak_rows <= max_rows
    assert limited.block_calls >= free.block_calls == 36
    # All four samples stay together: at worst one call for each block of one sample's trie.
    assert limited.block_calls <= 894


def test_tight_limits_are_used_up() -> None:
    rows = [(s, route) for route in SPACE for s in range(4)]
    assert plan(rows, SPACE, 12).peak_rows == 12
    assert plan(rows, SPACE, 536).peak_rows == 536
    chunked = Toy(plan(rows, SPACE, 3))
    assert chunked.peak_rows == 3 and chunked.block_calls == 4 * 894


def test_more_room_means_fewer_calls() -> None:
    rows = [(s, route) for route in SPACE for s in range(4)]
    calls = [Toy(plan(rows, SPACE, r)).block_calls for r in (3, 12, 48, 120, 268, 536)]
    assert calls == sorted(calls, reverse=True) and len(set(calls)) == len(calls)


def test_mixed_batch_walks_each_block_once() -> None:
    rows = [(i, SPACE.routes[8 * i]) for i in range(16)]
    toy = Toy(plan(rows, SPACE))
    assert toy.block_calls <= 36
    assert toy.peak_rows == 16
    assert Toy(plan(rows, SPACE, 16)).block_calls == toy.block_calls
    # Rows on one route each need no more than their number: 16 rows, 5 at a time.
    chunked = plan(rows, SPACE, 5)
    assert chunked.peak_rows == 5
    assert sum(isinstance(c, Readout) for c in chunked.calls) <= 8
    assert plan(rows, SPACE, 1).peak_rows == 1


def test_scattered_samples() -> None:
    rows = [(s, SPACE.route(1)) for s in (7, 2, 9)]
    schedule = plan(rows, SPACE)
    assert schedule.calls[0] == Embed(1, (2, 7, 9), 0)
    assert list(schedule.order) == [1, 0, 2]
    assert plan([(s, SPACE.route(1)) for s in (4, 5)], SPACE).calls[0] == Embed(1, range(4, 6), 0)


def test_repeated_pairs_are_computed_once() -> None:
    schedule = plan([(0, SPACE.route(5))] * 3, SPACE)
    assert schedule.peak_rows == 1
    assert list(schedule.order) == [0, 0, 0]


def test_a_switch_that_empties_its_anchor_takes_the_value_away() -> None:
    schedule = plan([(0, SPACE.route(0)), (1, SPACE.route(2))], SPACE)
    switch = next(call for call in schedule.calls if isinstance(call, Switch))
    assert switch == Switch(Stitch(S2L, 0), 2, Rows(0, 1, 2), 1, False)
    # What stays is one slice, and what arrives in an empty anchor is taken as it is.
    assert [c for c in schedule.calls if isinstance(c, Gather)] == [
        Gather(0, 1, (Rows(0, 0, 1),), 2)
    ]


def test_plans_are_cached() -> None:
    rows = [(i, SPACE.routes[i]) for i in range(20)]
    first = plan(rows, SPACE, 8)
    assert plan(tuple(rows), StitchingSpace(12, 24), 8) is first
    assert plan(iter(rows), SPACE, 8) is first
    assert plan(rows, SPACE, 9) is not first
    assert plan(rows[:-1], SPACE, 8) is not first


def test_bad_input() -> None:
    with pytest.raises(ValueError, match="at least one"):
        plan([], SPACE)
    with pytest.raises(ValueError, match="sample indices of 0 or more, got -1"):
        plan([(-1, SPACE.route(0))], SPACE)
    with pytest.raises(TypeError):
        plan([(0.5, SPACE.route(0))], SPACE)  # type: ignore[list-item]
    with pytest.raises(ValueError, match="route 4: S0–2 → L3–11"):
        plan([(0, StitchingSpace(12, 12).route(4))], SPACE)
    with pytest.raises(ValueError, match="route id must be in"):
        plan([(0, StitchingSpace(20, 20).routes[-1])], SPACE)
    whole = [(5, route) for route in SPACE]
    for max_rows in (2, 1, 0, -1):
        with pytest.raises(ValueError, match=f"at least 3 for .* sample 5, got {max_rows}"):
            plan(whole, SPACE, max_rows)
    with pytest.raises(ValueError, match="at least 1 "):
        plan(whole[:1], SPACE, 0)
