import math
from typing import Any

import pytest

from snkernels.routing.budget import Budget


@pytest.mark.parametrize(
    ("written", "kind", "amount"),
    [
        (0.5, "share", 0.5),
        (1, "share", 1.0),
        ("50 %", "share", 0.5),
        ("100%", "share", 1.0),
        (" 12.5 % ", "share", 0.125),
        ("20 GFLOPs", "flops", 20e9),
        ("20 G", "flops", 20e9),
        ("20g", "flops", 20e9),
        ("350 MFLOPs", "flops", 350e6),
        ("1.5 tflops", "flops", 1.5e12),
        ("4e9 FLOPs", "flops", 4e9),
        ("8 ms", "seconds", 0.008),
        ("0.5 s", "seconds", 0.5),
        (".5s", "seconds", 0.5),
        ("800 us", "seconds", 0.0008),
        ("800 µs", "seconds", 0.0008),
        ("800 μs", "seconds", 0.0008),
    ],
)
def test_what_people_write(written: Any, kind: str, amount: float) -> None:
    budget = Budget.parse(written)
    assert budget.kind == kind
    assert math.isclose(budget.amount, amount, rel_tol=1e-15)
    assert Budget.parse(budget) is budget
    assert Budget.parse(str(budget)) == budget


UNITS = ("share", "%", "MFLOPs", "GFLOPs", "TFLOPs", "us", "ms", "0.5 s")


@pytest.mark.parametrize(
    "written",
    [
        *(0, 0.0, -0.5, 1.01, 8, math.nan, math.inf),
        *("0 ms", "-8 ms", "nan ms", "inf GFLOPs", "101 %", "0 %", "-1 G", "1e999 s"),
        *("8", "8 min", "8 fps", "ms", "", "8 ms 9", "8 m s", "1.2.3 ms", "GFLOPs 20", "8,5 ms"),
    ],
)
def test_anything_else_is_refused_and_the_units_listed(written: Any) -> None:
    with pytest.raises(ValueError) as refusal:
        Budget.parse(written)
    message = str(refusal.value)
    assert message.startswith("budget must be ") and message.endswith(f"got {written!r}")
    assert all(unit in message for unit in UNITS)


@pytest.mark.parametrize("value", [None, True, [0.5], b"8 ms", 1j])
def test_other_types_are_refused(value: Any) -> None:
    with pytest.raises(TypeError, match=f"budget must be .*'8 ms'.*; got {type(value).__name__}"):
        Budget.parse(value)


@pytest.mark.parametrize(
    ("kind", "amount"),
    [("euros", 5.0), ("share", 1.5), ("flops", 0.0), ("seconds", math.inf), ("flops", math.nan)],
)
def test_amounts_of_nothing_are_refused(kind: Any, amount: float) -> None:
    with pytest.raises(ValueError, match=f"budget must be .*; got {amount} of '{kind}'"):
        Budget(kind, amount)


def test_amounts_have_a_unit_that_suits_them() -> None:
    texts = {
        "0.5 s": (0.0123, 2.0, 0.000047),
        "20 G": (4608338304, 61604135936, 350e6, 1900.0),
        "50 %": (0.0748, 1.0),
    }
    assert {
        unit: [Budget.parse(unit).of(a) for a in amounts] for unit, amounts in texts.items()
    } == {
        "0.5 s": ["12.3 ms", "2 s", "47 us"],
        "20 G": ["4.608 GFLOPs", "61.6 GFLOPs", "350 MFLOPs", "1900 FLOPs"],
        "50 %": ["7.48 %", "100 %"],
    }
