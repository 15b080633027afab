"""What a caller can spend on an image or a call: a share, multiply-adds, or time."""

from __future__ import annotations

import math
import numbers
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

_Kind: TypeAlias = Literal["share", "flops", "seconds"]

# Unit as written, in lower case: what it counts, and how much of that one is.
_UNITS: dict[str, tuple[_Kind, float]] = {
    "%": ("share", 1e-2),
    **{
        prefix + suffix: ("flops", factor)
        for prefix, factor in (("m", 1e6), ("g", 1e9), ("t", 1e12))
        for suffix in ("", "flop", "flops")
    },
    "flops": ("flops", 1.0),
    "s": ("seconds", 1.0),
    "ms": ("seconds", 1e-3),
    "us": ("seconds", 1e-6),
    "µs": ("seconds", 1e-6),
    "μs": ("seconds", 1e-6),
}
_WRITTEN = re.compile(r"\s*([-+]?[\d.]+(?:e[-+]?\d+)?|[-+]?nan|[-+]?inf)\s*(\S*)\s*", re.IGNORECASE)
_FORMS = (
    "a share of the large anchor's FLOPs in (0, 1], or a text with a unit: '50 %', "
    "'350 MFLOPs', '20 GFLOPs' or '20 G', '1 TFLOPs', '800 us', '8 ms', '0.5 s'"
)


@dataclass(frozen=True)
class Budget:
    """An amount of one of the things that a route costs.

    Attributes:
        kind: ``"share"`` of the large anchor's multiply-adds, ``"flops"`` (multiply-adds for one
            image), or ``"seconds"`` for one call.
        amount: Positive and finite; a share is at most 1.

    Raises:
        ValueError: It is not.
    """

    kind: _Kind
    amount: float

    def __post_init__(self) -> None:
        most = 1.0 if self.kind == "share" else math.inf
        fits = 0 < self.amount <= most and self.amount < math.inf
        if self.kind not in get_args(_Kind) or not fits:
            raise ValueError(
                f"budget must be a positive, finite amount of {', '.join(get_args(_Kind))}, "
                f"a share at most 1; got {self.amount!r} of {self.kind!r}"
            )

    @classmethod
    def parse(cls, value: float | str | Budget) -> Budget:
        """Read what a person writes: ``0.5``, ``"50 %"``, ``"20 GFLOPs"``, ``"20 G"``, ``"8 ms"``.

        A bare number is a share. Units are %, FLOPs, M, G or T with or without FLOPs, us, ms and s,
        in capitals or not; FLOPs are multiply-adds, as in ``snkernels.routing.cost``.

        Raises:
            TypeError: If it is neither a number nor a text.
            ValueError: If it has no such unit or is not positive and finite, or a share is above
                1; the message lists the units.
        """
        if isinstance(value, Budget):
            return value
        if isinstance(value, str):
            match = _WRITTEN.fullmatch(value)
            number, unit = match.groups() if match else ("", "")
            if unit.lower() not in _UNITS:
                raise ValueError(f"budget must be {_FORMS}; got {value!r}")
            kind, one = _UNITS[unit.lower()]
            try:
                amount = float(number) * one
            except ValueError:
                raise ValueError(f"budget must be {_FORMS}; got {value!r}") from None
        elif isinstance(value, numbers.Real) and not isinstance(value, bool):
            kind, amount = "share", float(value)
        else:
            raise TypeError(f"budget must be {_FORMS}; got {type(value).__name__}")
        if not 0 < amount < math.inf or (kind == "share" and amount > 1):
            raise ValueError(f"budget must be positive and finite: {_FORMS}; got {value!r}")
        return cls(kind, amount)

    def of(self, amount: float) -> str:
        """An amount of this kind as text, with its unit."""
        if self.kind == "share":
            return f"{_short(100 * amount)} %"
        if self.kind == "flops":
            return _scaled(
                amount, ((1e12, "TFLOPs"), (1e9, "GFLOPs"), (1e6, "MFLOPs"), (1.0, "FLOPs"))
            )
        return _scaled(amount, ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")))

    def __str__(self) -> str:
        return self.of(self.amount)


def _scaled(amount: float, units: tuple[tuple[float, str], ...]) -> str:
    one, unit = next(((one, unit) for one, unit in units if amount >= one), units[-1])
    return f"{_short(amount / one)} {unit}"


def _short(number: float) -> str:
    return f"{number:.4g}" if number < 1000 else f"{number:.0f}"
