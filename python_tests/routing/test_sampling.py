import json
import random
from collections import Counter
from collections.abc import Mapping
from itertools import pairwise

import pytest

from snkernels.routing.cost import ViTShape, route_flops
from snkernels.routing.sampling import Draws, RouteSampler, cost_groups, default_gap
from snkernels.routing.space import StitchingSpace

SHAPES = {
    name: ViTShape(embed_dim=width, depth=depth, tokens=197, patches=196, patch_size=16)
    for name, width, depth in (("S", 384, 12), ("B", 768, 12), ("L", 1024, 24))
}


def flops_of(small: str, large: str) -> dict[int, int]:
    a, b = SHAPES[small], SHAPES[large]
    return {route.id: route_flops(route, a, b) for route in StitchingSpace(a.depth, b.depth)}


S_L = flops_of("S", "L")


@pytest.mark.parametrize("pair", ["SB", "SL", "BL"])
def test_published_pairs_have_thirteen_groups(pair: str) -> None:
    flops = flops_of(*pair)
    groups = cost_groups(flops, 1e9)
    assert [len(group) for group in groups] == [1] + [11 + 1] * 11 + [1]
    assert groups[0] == [0] and groups[-1] == [1]
    assert cost_groups(flops, default_gap(flops)) == groups


@pytest.mark.parametrize("pair", ["SB", "SL", "BL"])
def test_published_probabilities(pair: str) -> None:
    probabilities = RouteSampler(flops_of(*pair)).probabilities()
    assert len(probabilities) == 134
    for route_id, p in probabilities.items():
        assert p == pytest.approx(1 / 13 if route_id < 2 else 1 / 13 / 12)
    assert f"{probabilities[0]:.1%}" == "7.7%" and f"{probabilities[2]:.2%}" == "0.64%"


def test_gap_is_measured_from_the_first_of_the_group() -> None:
    flops = {7: 10, 3: 14, 5: 19, 4: 20, 9: 21, 8: 10}
    assert cost_groups(flops, 10) == [[7, 8, 3, 5, 4], [9]]
    assert cost_groups(flops, 4) == [[7, 8, 3], [5, 4, 9]]
    assert cost_groups(flops, 0) == [[7, 8], [3], [5], [4], [9]]


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("depths", [(2, 2), (3, 5), (4, 9), (24, 32), (12, 40)])
def test_default_gap_is_scale_free(depths: tuple[int, int], scale: int) -> None:
    space = StitchingSpace(*depths)
    small, large = (
        ViTShape(embed_dim=width * scale, depth=depth, tokens=50, patches=49, patch_size=4)
        for width, depth in zip((64, 128), depths, strict=True)
    )
    flops = {route.id: route_flops(route, small, large) for route in space}
    count = min(depths)
    assert default_gap(flops) == pytest.approx((flops[1] - flops[0]) / count / 2)


def test_default_gap_needs_a_whole_space() -> None:
    assert default_gap({0: 4, 1: 10}) == 3
    for ids in ((), (0,), (0, 1, 2), (0, 1, 15, 127), (5, 6), range(1, 13)):
        bad = {i: S_L[i] for i in ids}
        with pytest.raises(ValueError, match="every route of a stitching space"):
            default_gap(bad)


def test_tilt_prefers_costly_groups() -> None:
    flops = {0: 0, 1: 100, 2: 50, 3: 51}
    probabilities = RouteSampler(flops, gap=10, tilt=True).probabilities()
    # i/k + 1/k for i = 1, 2, 3 is 2/3, 3/3, 4/3; they add up to 3.
    expected = {0: 2 / 9, 2: 3 / 18, 3: 3 / 18, 1: 4 / 9}
    assert probabilities == pytest.approx(expected)
    assert list(probabilities) == [0, 2, 3, 1]


def chi_square(counts: Mapping[int, int], probabilities: Mapping[int, float]) -> float:
    total = sum(counts.values())
    return sum((counts.get(i, 0) - total * p) ** 2 / (total * p) for i, p in probabilities.items())


# 99.9 % quantile of chi-square with 133 degrees of freedom.
CHI_SQUARE_133 = 188.0


@pytest.mark.parametrize("tilt", [False, True])
def test_draws_follow_the_probabilities(tilt: bool) -> None:
    sampler = RouteSampler(S_L, tilt=tilt, seed=1)
    counts = Counter(sampler.draw() for _ in range(20_000))
    assert chi_square(counts, sampler.probabilities()) < CHI_SQUARE_133
    # The same draws are told apart from the other law, and from uniform ones.
    other = RouteSampler(S_L, tilt=not tilt).probabilities()
    assert chi_square(counts, other) > 5 * CHI_SQUARE_133
    assert chi_square(counts, dict.fromkeys(S_L, 1 / 134)) > 5 * CHI_SQUARE_133


def test_neighbouring_draws_are_independent() -> None:
    flops = {0: 0, 1: 10}
    sampler = RouteSampler(flops, gap=1, seed=3)
    draws = [sampler.draw() for _ in range(8_000)]
    pairs = Counter(a * 2 + b for a, b in pairwise(draws))
    # 99.9 % quantile of chi-square with 3 degrees of freedom.
    assert chi_square(pairs, dict.fromkeys(range(4), 0.25)) < 16.27


def draws_of(n: int = 200, **options: object) -> list[int]:
    sampler = RouteSampler(S_L, **options)  # type: ignore[arg-type]
    return [sampler.draw() for _ in range(n)]


def test_seed_decides_the_draws() -> None:
    assert draws_of(seed=5) == draws_of(seed=5)
    assert draws_of(seed=5) != draws_of(seed=6)


def test_draws_stay_what_they_were() -> None:
    # Pinned: a checkpoint must resume with the same draws on any Python and any later version.
    assert draws_of(8, seed=0) == [76, 130, 119, 85, 123, 64, 123, 100]


def test_other_generators_do_not_matter() -> None:
    expected = draws_of(50)
    random.seed(0)
    sampler = RouteSampler(S_L)
    state = random.getstate()
    mixed = []
    for _ in range(50):
        mixed.append(sampler.draw())
        random.random()
    assert mixed == expected
    random.setstate(state)
    sampler.draw()
    assert random.getstate() == state


def test_ranks_draw_their_own_or_all_the_same() -> None:
    own = [draws_of(rank=rank) for rank in range(4)]
    assert len({tuple(draws) for draws in own}) == 4
    same = [draws_of(rank=rank, draws="shared") for rank in range(4)]
    assert same == [same[0]] * 4
    # Draws of two ranks agree no more often than chance: 2/169 + 132 (1/156)² = 1.7 %.
    agree = sum(a == b for a, b in zip(draws_of(3000), draws_of(3000, rank=1), strict=True))
    assert agree < 90


def test_ranks_draw_routes_of_equal_cost() -> None:
    by_rank = [draws_of(3000, rank=rank, draws="equal_cost") for rank in range(3)]
    number = {i: n for n, group in enumerate(RouteSampler(S_L).groups) for i in group}
    groups = [[number[route] for route in draws] for draws in by_rank]
    assert groups == [groups[0]] * 3
    # In a group of twelve, two ranks agree by chance; 11/13 of 3000 draws fall into such groups.
    pairs = [(a, b) for a, b in zip(*by_rank[:2], strict=True) if a > 1]
    assert len(pairs) > 2400
    agree = Counter(a == b for a, b in pairs)
    assert chi_square(agree, {True: 1 / 12, False: 11 / 12}) < 10.83  # 99.9 %, 1 degree of freedom
    for draws in by_rank:
        assert chi_square(Counter(draws), RouteSampler(S_L).probabilities()) < CHI_SQUARE_133


def test_unknown_kind_of_draws() -> None:
    with pytest.raises(ValueError, match="one of own, shared, equal_cost, got 'same'"):
        RouteSampler(S_L, draws="same")  # type: ignore[arg-type]


@pytest.mark.parametrize("draws", ["own", "shared", "equal_cost"])
@pytest.mark.parametrize("rank", [0, 3])
def test_state_of_rank_zero_resumes_every_rank(rank: int, draws: Draws) -> None:
    expected = draws_of(60, seed=9, rank=rank, draws=draws)
    writer = RouteSampler(S_L, seed=9, rank=0, draws=draws)
    for _ in range(25):
        writer.draw()
    text = json.dumps(writer.state_dict())
    resumed = RouteSampler(S_L, seed=1234, rank=rank, draws=draws)
    resumed.draw()
    resumed.load_state_dict(json.loads(text))
    assert [resumed.draw() for _ in range(35)] == expected[25:]


@pytest.mark.parametrize(
    "state",
    [{}, {"seed": 1}, {"seed": 1, "draws": -1}, {"seed": 1, "draws": "2"}, {"seed": 1, "draw": 2}],
)
def test_bad_state_changes_nothing(state: dict[str, object]) -> None:
    sampler = RouteSampler(S_L, seed=4)
    expected = draws_of(2, seed=4)
    assert sampler.draw() == expected[0]
    with pytest.raises(ValueError, match="must"):
        sampler.load_state_dict(state)
    assert sampler.draw() == expected[1]


def test_bad_groups() -> None:
    with pytest.raises(ValueError, match="at least one route"):
        cost_groups({}, 1)
    for gap in (-1, float("nan")):
        with pytest.raises(ValueError, match="gap must be zero or more"):
            cost_groups(S_L, gap)
