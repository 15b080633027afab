from typing import Any

import numpy as np
import pytest
import torch

from snkernels.integers import integer, integers, is_one


@pytest.mark.parametrize(
    "value", [7, np.int64(7), np.uint8(7), np.array(7), torch.tensor(7), torch.tensor(7).int()]
)
def test_what_holds_an_integer_is_one(value: Any) -> None:
    found = integer("size", value)
    assert found == 7
    assert type(found) is int


@pytest.mark.parametrize(
    "value",
    [
        7.0,
        "7",
        None,
        True,
        np.bool_(True),
        torch.tensor(True),
        torch.tensor(7.0),
        np.float64(7),
        [7],
        np.array([7]),
        torch.tensor([7]),
    ],
)
def test_nothing_else_is(value: Any) -> None:
    with pytest.raises(TypeError, match=f"size must be an integer, got .*{type(value).__name__}"):
        integer("size", value)


def test_least() -> None:
    assert integer("size", 1, 1) == 1
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        integer("size", np.int32(0), 1)
    assert integer("size", -3) == -3


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (4, [4]),
        (torch.tensor(4), [4]),
        ([4, 1, 4], [4, 1]),
        (range(1, 3), [1, 2]),
        (iter([2, 1]), [2, 1]),
        (np.array([3, 1]), [3, 1]),
        (torch.tensor([3, 3, 1]), [3, 1]),
    ],
)
def test_one_or_some_each_once_in_order(values: Any, expected: list[int]) -> None:
    assert integers("sizes", values, 1) == expected


def test_bad_ones_among_some() -> None:
    with pytest.raises(ValueError, match="sizes must hold at least one integer, got none"):
        integers("sizes", [])
    with pytest.raises(ValueError, match="each of sizes must be at least 1, got 0"):
        integers("sizes", [2, 0], 1)
    with pytest.raises(TypeError, match=r"each of sizes must be an integer, got 1\.5, a float"):
        integers("sizes", (2, 1.5))
    with pytest.raises(TypeError, match="each of sizes must be an integer, got '12', a str"):
        integers("sizes", "12")


@pytest.mark.parametrize("value", [1, 1.5, "12", None, np.array(1), torch.tensor(1)])
def test_is_one(value: Any) -> None:
    assert is_one(value)


@pytest.mark.parametrize("value", [[1], (), {1}, range(2), np.array([1]), torch.tensor([1])])
def test_is_not_one(value: Any) -> None:
    assert not is_one(value)
