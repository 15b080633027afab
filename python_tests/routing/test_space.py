from fractions import Fraction
from itertools import combinations, pairwise
from math import floor
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from snkernels.routing.space import L2S, S2L, Route, Segment, Stitch, StitchingSpace

depths = st.integers(1, 48)


def official_routes(
    small: int, large: int
) -> dict[int, list[tuple[str, int, int] | tuple[str, int]]]:
    """The release's rules, with its 0-based inclusive block ids, for depth ratios 1 and 2.

    Each route is a list of ("S" or "L", first block, last block) and ("S2L" or "L2S", index).
    """
    ratio = large // small
    nearest = [block * small // large for block in range(large)]
    to_large = [(i, (i + 1) * ratio) for i in range(small)]
    to_small = [(i, nearest[i] + 1) for i in range(large - 1) if small == large or i % 2 == 1]
    routes: list[list[tuple[str, int, int] | tuple[str, int]] | None] = [
        [("S", 0, small - 1)],
        [("L", 0, large - 1)],
    ]
    for i, entry in to_large:
        if i == small - 1:
            routes.append(None)  # numbered, never used
        else:
            routes.append([("S", 0, i), ("S2L", i), ("L", entry, large - 1)])
    for i, entry in to_small:
        routes.append([("L", 0, i), ("L2S", i // ratio), ("S", entry, small - 1)])
    for i, entry in to_small:
        for j, back in to_large:
            if j >= entry and j != small - 1:
                routes.append(
                    [
                        ("L", 0, i),
                        ("L2S", i // ratio),
                        ("S", entry, j),
                        ("S2L", j),
                        ("L", back, large - 1),
                    ]
                )
    for i, entry in to_large:
        for j, back in to_small:
            if j >= entry:
                routes.append(
                    [
                        ("S", 0, i),
                        ("S2L", i),
                        ("L", entry, j),
                        ("L2S", j // ratio),
                        ("S", back, small - 1),
                    ]
                )
    return {i: route for i, route in enumerate(routes) if route is not None}


def spelled(route: Route) -> list[tuple[str, int, int] | tuple[str, int]]:
    out: list[tuple[str, int, int] | tuple[str, int]] = []
    for i, segment in enumerate(route.segments):
        out.append(("SL"[segment.anchor], segment.start, segment.stop - 1))
        if i < len(route.stitches):
            stitch = route.stitches[i]
            out.append((("S2L", "L2S")[stitch.direction], stitch.index))
    return out


@pytest.mark.parametrize(
    ("small", "large"), [(d, d) for d in range(1, 25)] + [(d, 2 * d) for d in range(1, 25)]
)
def test_equals_the_release_for_ratios_one_and_two(small: int, large: int) -> None:
    space = StitchingSpace(small, large)
    assert {route.id: spelled(route) for route in space} == official_routes(small, large)


@pytest.mark.parametrize(
    ("route_id", "text", "direction"),
    [
        (0, "S0–11", "S"),
        (1, "L0–23", "L"),
        (2, "S0 → L2–23", "S→L"),
        (12, "S0–10 → L22–23", "S→L"),
        (14, "L0–1 → S1–11", "L→S"),
        (24, "L0–21 → S11", "L→S"),
        (25, "L0–1 → S1 → L4–23", "L→S→L"),
        (134, "S0–9 → L20–21 → S11", "S→L→S"),
    ],
)
def test_known_routes_of_deit3_small_large(route_id: int, text: str, direction: str) -> None:
    route = StitchingSpace(12, 24).route(route_id)
    assert str(route) == text
    assert route.direction == direction


@pytest.mark.parametrize(("small", "large"), [(12, 12), (12, 24)])
def test_counts_of_the_published_spaces(small: int, large: int) -> None:
    space = StitchingSpace(small, large)
    assert space.num_stitches == (12, 11)
    assert len(space) == 134
    assert [route.id for route in space] == [i for i in range(135) if i != 13]
    by_direction = {
        name: [r.id for r in space if r.direction == name]
        for name in ("S→L", "L→S", "L→S→L", "S→L→S")
    }
    assert by_direction == {
        "S→L": list(range(2, 13)),
        "L→S": list(range(14, 25)),
        "L→S→L": list(range(25, 80)),
        "S→L→S": list(range(80, 135)),
    }


def check_cuts(space: StitchingSpace) -> None:
    depth = (space.small_depth, space.large_depth)
    shallow = depth.index(min(depth))
    deep = 1 - shallow
    count = depth[shallow]
    assert [cut[shallow] for cut in space.cuts] == list(range(1, count + 1))
    ratio = Fraction(depth[deep], count)
    half = Fraction(1, 2)
    assert [cut[deep] for cut in space.cuts] == [
        floor(k * ratio + half) for k in range(1, count + 1)
    ]
    boundaries = [0, *(cut[deep] for cut in space.cuts)]
    assert all(a < b for a, b in pairwise(boundaries))
    assert space.cuts[-1] == depth


@pytest.mark.parametrize("small", range(1, 49))
def test_cut_map_of_every_pair_of_depths(small: int) -> None:
    for large in range(1, 49):
        check_cuts(StitchingSpace(small, large))


def test_cuts_between_boundaries_round_half_up() -> None:
    assert StitchingSpace(2, 5).cuts == ((1, 3), (2, 5))
    assert StitchingSpace(5, 2).cuts == ((3, 1), (5, 2))
    assert StitchingSpace(3, 4).cuts == ((1, 1), (2, 3), (3, 4))


def check_routes(space: StitchingSpace) -> None:
    depth = (space.small_depth, space.large_depth)
    cuts = space.cuts
    # Which boundaries every stitch was seen to join.
    joined: dict[Stitch, set[tuple[int, int]]] = {}
    for route in space:
        assert len(route.stitches) == len(route.segments) - 1
        first, last = route.segments[0], route.segments[-1]
        assert first.start == 0 and last.stop == depth[last.anchor]
        assert all(0 <= s.start < s.stop <= depth[s.anchor] for s in route.segments)
        parts = zip(route.segments, route.segments[1:], route.stitches, strict=False)
        for left, right, stitch in parts:
            assert right.anchor == 1 - left.anchor
            assert stitch.direction == (S2L if left.anchor == 0 else L2S)
            assert 0 <= stitch.index < space.num_stitches[stitch.direction]
            boundary = [0, 0]
            boundary[left.anchor], boundary[right.anchor] = left.stop, right.start
            joined.setdefault(stitch, set()).add((boundary[0], boundary[1]))
    # A stitch serves one cut, and a cut one stitch in each direction.
    for direction in (S2L, L2S):
        served = {s.index: pairs for s, pairs in joined.items() if s.direction == direction}
        assert served == {k: {cuts[k]} for k in range(len(cuts) - 1)}
    # No route twice.
    assert len({(r.segments, r.stitches) for r in space}) == len(space)
    # None missing: one start per anchor, then any choice of at most two inner cuts.
    inner = len(cuts) - 1
    assert len(space) == 2 * (1 + inner + inner * (inner - 1) // 2)


@pytest.mark.parametrize("small", range(1, 49))
def test_routes_of_every_pair_of_depths(small: int) -> None:
    for large in range(1, 49):
        check_routes(StitchingSpace(small, large))


@settings(deadline=None, max_examples=60)
@given(depths, depths)
def test_ids_follow_the_written_order(small: int, large: int) -> None:
    space = StitchingSpace(small, large)
    count = min(small, large)
    inner = range(1, count)
    pairs = list(combinations(inner, 2))

    def crossings(route: Route) -> tuple[str, tuple[int, ...]]:
        return route.direction, tuple(stitch.index + 1 for stitch in route.stitches)

    expected: list[tuple[str, tuple[int, ...]] | None] = [("S", ()), ("L", ())]
    expected += [("S→L", (k,)) for k in inner] + [None] + [("L→S", (k,)) for k in inner]
    expected += [("L→S→L", pair) for pair in pairs] + [("S→L→S", pair) for pair in pairs]
    found = {route.id: crossings(route) for route in space}
    assert found == {i: path for i, path in enumerate(expected) if path is not None}
    assert [route.id for route in space] == sorted(found)


@given(st.integers(1, 20), st.integers(1, 20))
def test_swapping_the_anchors_mirrors_the_space(small: int, large: int) -> None:
    space, mirror = StitchingSpace(small, large), StitchingSpace(large, small)

    def blocks(space: StitchingSpace, flip: bool) -> set[tuple[tuple[int, int, int], ...]]:
        return {
            tuple((s.anchor ^ flip, s.start, s.stop) for s in route.segments) for route in space
        }

    assert blocks(space, False) == blocks(mirror, True)


def test_every_block_of_the_deeper_anchor_can_be_skipped() -> None:
    space = StitchingSpace(12, 32)
    for block in range(32):
        used = [any(s.anchor == 1 and s.start <= block < s.stop for s in r.segments) for r in space]
        assert any(used) and not all(used)


@pytest.mark.parametrize("bad", [13, 135, -1, 1000])
def test_unknown_id_names_the_valid_ones(bad: int) -> None:
    with pytest.raises(ValueError, match=rf"route id must be in 0–12 or 14–134, got {bad}"):
        StitchingSpace(12, 24).route(bad)


@pytest.mark.parametrize("bad", ["3", None, 3.0, True])
def test_an_id_is_an_integer(bad: Any) -> None:
    with pytest.raises(TypeError, match=rf"route id must be an integer, got {bad!r}, a "):
        StitchingSpace(12, 24).route(bad)


def test_integers_of_every_kind_are_ids() -> None:
    space = StitchingSpace(12, 24)
    for route_id in (np.int64(60), np.array(60), torch.tensor(60), torch.tensor(60).int()):
        assert space.route(route_id) is space.route(60)
    for ids in (np.array([3, 60]), torch.tensor([3, 60]), (3, 60), (i for i in (3, 60))):
        assert space.named(ids, "routes") == [space.route(3), space.route(60)]
    assert space.named("all", "routes") == list(space)


@pytest.mark.parametrize("bad", ["every", "", 3, torch.tensor(3), []])
def test_what_names_no_routes(bad: Any) -> None:
    message = 'check must be "all" or route ids, got|check must name at least one route, got none'
    with pytest.raises((TypeError, ValueError), match=message):
        StitchingSpace(12, 24).named(bad, "check")


def test_unknown_id_of_a_space_without_stitches() -> None:
    with pytest.raises(ValueError, match=r"route id must be in 0–1, got 2"):
        StitchingSpace(1, 7).route(2)


@pytest.mark.parametrize(
    ("depths", "error", "message"),
    [
        ((0, 3), ValueError, "small_depth must be at least 1, got 0"),
        ((3, -1), ValueError, "large_depth must be at least 1, got -1"),
        ((3, 2.0), TypeError, "large_depth must be an integer, got 2.0, a float"),
    ],
)
def test_bad_depths(depths: tuple[int, int], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        StitchingSpace(*depths)


def test_lookup_and_iteration_agree() -> None:
    space = StitchingSpace(5, 9)
    assert tuple(space) == space.routes
    assert all(space.route(route.id) is route for route in space)
    assert StitchingSpace(5, 9) == space and hash(StitchingSpace(5, 9)) == hash(space)
    assert StitchingSpace(9, 5) != space


def test_segment_text() -> None:
    assert str(Segment(1, 10, 20)) == "L10–19"
    assert str(Segment(0, 1, 2)) == "S1"
