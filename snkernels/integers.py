"""What callers give for an integer, and for one value where several could stand."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any


def integer(name: str, value: Any, least: int | None = None) -> int:
    """Return as an int what a caller gave for one: an int, NumPy's, or a tensor that holds one.

    Args:
        name: What the caller calls it; errors name it so.
        value: What was given.
        least: The smallest that it may be.

    Raises:
        TypeError: If it is something else, such as a bool or several.
        ValueError: If it is below ``least``.
    """
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    truth = isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool")
    if number is None or truth or int(getattr(value, "ndim", 0)) > 0:
        raise TypeError(f"{name} must be an integer, got {value!r:.80}, a {type(value).__name__}")
    if least is not None and number < least:
        raise ValueError(f"{name} must be at least {least}, got {number}")
    return number


def integers(name: str, values: Any, least: int | None = None) -> list[int]:
    """Return what a caller gave for one integer or some, each once, in the order given.

    Raises:
        TypeError: If one is no integer.
        ValueError: If one is below ``least``, or there are none.
    """
    given = [values] if is_one(values) else values
    found = list(dict.fromkeys(integer(f"each of {name}", value, least) for value in given))
    if not found:
        raise ValueError(f"{name} must hold at least one integer, got none")
    return found


def is_one(value: Any) -> bool:
    """Whether this is one value and not several: a text is, and a tensor or array of no dims."""
    if isinstance(value, str) or not isinstance(value, Iterable):
        return True
    return getattr(value, "ndim", None) == 0
