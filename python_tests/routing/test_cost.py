import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from snkernels.routing.cost import (
    ViTShape,
    block_flops,
    embed_flops,
    head_flops,
    pareto_front,
    route_flops,
    stitch_flops,
)
from snkernels.routing.space import StitchingSpace

SMALL = ViTShape(embed_dim=384, depth=12, tokens=197, patches=196, patch_size=16)
LARGE = ViTShape(embed_dim=1024, depth=24, tokens=197, patches=196, patch_size=16)
PUBLISHED = Path(__file__).parent / "data" / "imagenet_s_l.csv"


def published() -> list[dict[str, str]]:
    with PUBLISHED.open(newline="") as file:
        return list(csv.DictReader(file))


def test_all_published_flops_exactly() -> None:
    expected = {int(row["stitch_id"]): int(row["flops"]) for row in published()}
    assert len(expected) == 134
    assert {r.id: route_flops(r, SMALL, LARGE) for r in StitchingSpace(12, 24)} == expected


def test_parts_by_hand() -> None:
    shape = ViTShape(
        embed_dim=6, depth=1, tokens=5, patches=4, patch_size=2, in_chans=1, num_classes=7
    )
    assert embed_flops(shape) == 4 * 4 * 6
    assert block_flops(shape) == 12 * 5 * 36 + 2 * 25 * 6 + 10 * 5 * 6
    assert head_flops(shape) == 5 * 5 * 6 + 6 * 7
    assert stitch_flops(shape, SMALL) == 5 * 6 * 384


def test_mlp_ratio_counts() -> None:
    base = ViTShape(embed_dim=10, depth=1, tokens=3, patches=2, patch_size=2)
    wide = ViTShape(embed_dim=10, depth=1, tokens=3, patches=2, patch_size=2, mlp_ratio=5.5)
    assert block_flops(wide) - block_flops(base) == 2 * 3 * 10 * (55 - 40)


def test_front_of_the_published_results() -> None:
    rows = published()
    front = pareto_front([int(r["flops"]) for r in rows], [float(r["top1"]) for r in rows])
    ids = [int(rows[i]["stitch_id"]) for i in front]
    assert ids == [0, 15, 127, 16, 123, 118, 112, 6, 5, 4, 3, 1]


small_numbers = st.integers(0, 5).map(float)


@given(st.lists(st.tuples(small_numbers, small_numbers), max_size=12))
def test_front_is_what_nothing_dominates(points: list[tuple[float, float]]) -> None:
    def dominates(a: tuple[float, float], b: tuple[float, float]) -> bool:
        return a[0] <= b[0] and a[1] >= b[1] and a != b

    front = pareto_front([cost for cost, _ in points], [score for _, score in points])
    assert sorted(front) == [
        i for i, point in enumerate(points) if not any(dominates(p, point) for p in points)
    ]
    assert [points[i][0] for i in front] == sorted(points[i][0] for i in front)


def test_front_rejects_bad_input() -> None:
    with pytest.raises(ValueError, match="one length, got 2 and 1"):
        pareto_front([1, 2], [1])
    with pytest.raises(ValueError, match=r"scores\[1\] is"):
        pareto_front([1, 2], [1, float("nan")])
    with pytest.raises(ValueError, match=r"costs\[0\] is"):
        pareto_front([float("nan")], [1])
