"""Latency of a route, predicted by adding up what its parts take, and the record of those times."""

from __future__ import annotations

import json
import math
import os
import statistics
from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from snkernels.files import replacing
from snkernels.routing.space import ANCHOR_NAMES, Route, StitchingSpace
from snkernels.text import aligned

_FORMAT = "snkernels.Profile/1"

Pair = tuple[float, float]
PARTS = ("embed", "block", "exit", "switch", "finish")
"""Names of the parts, in the order of `Parts`."""


@dataclass(frozen=True)
class Parts:
    """Seconds that the parts of a route take at one batch size, for the small and large anchor.

    0 stands for a part that no route has.

    Attributes:
        embed: What comes before the first block: checks of the images, the plan, the embedding,
            and norm1 of that block.
        block: A block that another one follows, whose norm1 it computes too.
        exit: A block that a switch follows.
        switch: The stitch from this anchor to the other, and norm1 of the block that follows.
        finish: The last block, as far as the head needs it, and the head.
    """

    embed: Pair
    block: Pair
    exit: Pair
    switch: Pair
    finish: Pair

    def seconds(self, route: Route) -> float:
        """Seconds that a route takes: the sum over its parts."""
        total = self.embed[route.segments[0].anchor]
        for segment in route.segments:
            total += (segment.stop - segment.start - 1) * self.block[segment.anchor]
        for segment in route.segments[:-1]:
            total += self.exit[segment.anchor] + self.switch[segment.anchor]
        return total + self.finish[route.segments[-1].anchor]


@dataclass(frozen=True)
class Check:
    """A route that was run whole, to compare with what its parts add up to.

    Attributes:
        batch_size: Images of the call.
        route: Id of the route.
        predicted: Seconds by ``Parts.seconds``.
        measured: Seconds of ``model(images, stitch=route)``: ``predicted`` times the median of what
            calls took over the sum of their parts right before and after.
    """

    batch_size: int
    route: int
    predicted: float
    measured: float

    @property
    def error(self) -> float:
        """Predicted over measured, minus 1."""
        return self.predicted / self.measured - 1


@dataclass(frozen=True)
class Setting:
    """What a latency depends on beside the model.

    Attributes:
        device: Name of the processor or GPU.
        threads: Threads of torch on a CPU; None on a GPU.
        dtype: Of the parameters and images, such as ``"float32"``.
        torch: Version of torch.
        autocast: Dtype of autocast, or None where it was off.
        backend: The backend that was forced, or None.
        compiled: Whether the blocks were compiled.
    """

    device: str
    threads: int | None
    dtype: str
    torch: str
    autocast: str | None = None
    backend: str | None = None
    compiled: bool = False

    def __str__(self) -> str:
        facts = [self.device]
        if self.threads is not None:
            facts.append(f"threads: {self.threads}")
        facts += [self.dtype, f"torch {self.torch}"]
        if self.autocast is not None:
            facts.append(f"autocast to {self.autocast}")
        if self.backend is not None:
            facts.append(f"backend {self.backend}")
        if self.compiled:
            facts.append("compiled blocks")
        return ", ".join(facts)


@dataclass(frozen=True)
class Profile:
    """What the parts of a model take on one device, and how well that predicts whole routes.

    Attributes:
        setting: Where it was measured.
        model: Shapes of the anchors and rank of the stitches; see ``snkernels.models.setting``.
        parts: For each measured batch size, ascending, the seconds of the parts.
        checks: Routes that were run whole.
    """

    setting: Setting
    model: Mapping[str, Any]
    parts: Mapping[int, Parts]
    checks: tuple[Check, ...]

    @cached_property
    def space(self) -> StitchingSpace:
        """The space of the model's routes."""
        small, large = self.model["anchors"]
        return StitchingSpace(small["depth"], large["depth"])

    def seconds(self, route: Route | int, batch_size: int) -> float:
        """Predict the latency of one call of a route, in seconds.

        Between two measured batch sizes it is taken to grow evenly.

        Raises:
            ValueError: If no route has this id, or ``batch_size`` is beyond the measured ones.
        """
        if not isinstance(route, Route):
            route = self.space.route(route)
        sizes = list(self.parts)
        if not sizes[0] <= batch_size <= sizes[-1]:
            measured = ", ".join(map(str, sizes))
            raise ValueError(
                f"batch_size must lie within those that were measured ({measured}), "
                f"got {batch_size}"
            )
        above = sizes[bisect_left(sizes, batch_size)]
        seconds = self.parts[above].seconds(route)
        if above == batch_size:
            return seconds
        below = sizes[bisect_left(sizes, batch_size) - 1]
        share = (above - batch_size) / (above - below)
        return seconds + share * (self.parts[below].seconds(route) - seconds)

    def check_model(self, shapes: Mapping[str, Any]) -> None:
        """Check that a model is the one that was measured.

        Raises:
            ValueError: If not; the message names each difference.
        """
        here, there = _flat(shapes), _flat(self.model)
        _refuse("profile must be of this model", here, there)

    def check_setting(self, setting: Setting) -> None:
        """Check that what was measured there holds here.

        Raises:
            ValueError: If not; the message names each difference.
        """
        _refuse("profile must be of this device and dtype", asdict(setting), asdict(self.setting))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON; the file appears when it is complete, until then the old one stays.

        Raises:
            OSError: If the file cannot be written.
        """
        with replacing(path) as partial:
            partial.write_text(json.dumps(self.to_json(), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Profile:
        """Read what ``save`` wrote.

        Raises:
            OSError: If the file cannot be read.
            ValueError: If it is no such file, or damaged.
        """
        try:
            return cls.from_json(json.loads(Path(path).read_text(encoding="utf-8")))
        except ValueError as error:
            raise ValueError(f"{path} is no profile of ours: {error}") from error

    def to_json(self) -> dict[str, Any]:
        """It as values that JSON can hold."""
        return {
            "format": _FORMAT,
            "setting": asdict(self.setting),
            "model": dict(self.model),
            "parts": {str(size): asdict(parts) for size, parts in self.parts.items()},
            "checks": [asdict(check) for check in self.checks],
        }

    @classmethod
    def from_json(cls, values: Any) -> Profile:
        """What ``to_json`` gave, checked.

        Raises:
            ValueError: If a value is missing, of another type, or no time; the message says which.
        """
        if not isinstance(values, Mapping) or values.get("format") != _FORMAT:
            raise ValueError(f"it must be a mapping with format {_FORMAT!r}")
        try:
            setting = Setting(**values["setting"])
            parts = {
                int(size): Parts(**{name: _pair(name, value) for name, value in each.items()})
                for size, each in values["parts"].items()
            }
            if not parts or min(parts) < 1:
                raise ValueError(f"batch sizes must be 1 or more, got {list(parts)}")
            checks = tuple(Check(**check) for check in values["checks"])
            model = {"anchors": list(values["model"]["anchors"]), "rank": values["model"]["rank"]}
            space = StitchingSpace(*(anchor["depth"] for anchor in model["anchors"]))
            for check in checks:
                space.route(check.route)
                _time("predicted", check.predicted)
                if _time("measured", check.measured) == 0 or check.batch_size not in parts:
                    raise ValueError(f"{check} cannot have been measured")
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return cls(setting, model, dict(sorted(parts.items())), checks)

    def summary(self) -> str:
        """How well the parts predict whole routes, as a sentence."""
        if not self.checks:
            return "No route was run whole to check them."
        by_error = sorted(self.checks, key=lambda check: abs(check.error))
        sizes = {check.batch_size for check in self.checks}
        routes = {check.route for check in self.checks}
        worst = by_error[-1]
        return (
            f"Routes run whole: {len(routes)}, at batch {', '.join(map(str, sorted(sizes)))}. "
            f"Error of the prediction: median {_percent(self.error())}, "
            f"95 % within {_percent(self.error(0.95))}, worst {_percent(abs(worst.error))} "
            f"(route {worst.route}, {self.space.route(worst.route)}, at batch {worst.batch_size}: "
            f"{_ms(worst.predicted)} predicted, {_ms(worst.measured)} ms measured)."
        )

    def error(self, share: float = 0.5) -> float:
        """The relative error that this share of the checks does not exceed, sign dropped.

        Raises:
            ValueError: If there are no checks, or ``share`` is not in (0, 1].
        """
        if not self.checks:
            raise ValueError("checks must not be empty")
        if not 0 < share <= 1:
            raise ValueError(f"share must be in (0, 1], got {share}")
        errors = sorted(abs(check.error) for check in self.checks)
        if share == 0.5:
            return statistics.median(errors)
        return errors[math.ceil(share * len(errors)) - 1]

    def table(self) -> str:
        """The parts, and both anchors as a whole, as text for a terminal; in milliseconds."""
        rows = [["ms", *(f"batch {size}" for size in self.parts)]]
        for name in PARTS:
            for i, anchor in enumerate(ANCHOR_NAMES):
                to = f"→{ANCHOR_NAMES[1 - i]}" if name == "switch" else ""
                times = (getattr(parts, name)[i] for parts in self.parts.values())
                rows.append([f"{name} {anchor}{to}", *map(_ms, times)])
        for i, anchor in enumerate(ANCHOR_NAMES):
            rows.append([f"all of {anchor}", *(_ms(self.seconds(i, size)) for size in self.parts)])
        return aligned(rows, right=range(1, len(rows[0])))

    def __str__(self) -> str:
        return f"{self.setting}\n\n{self.table()}\n\n{self.summary()}"


def _pair(name: str, value: Any) -> Pair:
    """The seconds of both anchors, from JSON."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        raise ValueError(f"{name} must be two times, got {value!r}")
    small, large = (_time(name, seconds) for seconds in value)
    return small, large


def _time(name: str, value: Any) -> float:
    if not isinstance(value, float | int) or not 0 <= value < math.inf:
        raise ValueError(f"{name} must be seconds of 0 or more, got {value!r}")
    return value


def _flat(shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a model under names that a person reads."""
    small, large = shapes["anchors"]
    return {
        **{f"{fact} of the small anchor": value for fact, value in small.items()},
        **{f"{fact} of the large anchor": value for fact, value in large.items()},
        "rank": shapes["rank"],
    }


def _refuse(demand: str, here: Mapping[str, Any], there: Mapping[str, Any]) -> None:
    """Raise ValueError where two sets of facts differ."""
    differences = [
        f"{fact} is {value!r} here and was {there.get(fact)!r} when it was measured"
        for fact, value in here.items()
        if there.get(fact) != value
    ]
    if differences:
        raise ValueError(
            f"{demand}, but {'; '.join(differences)}. Measure anew with snkernels.profile"
        )


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.3g}" if seconds < 0.1 else f"{seconds * 1e3:,.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
