"""What the kernels must reach on an H200 or on two CPU cores, beside what a record says they do.

    python -m benchmarks.targets gpu-run/record.json

Of every case the fastest kernel of this library counts. A backward pass is what forward+backward
takes beyond forward.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.case import BARE, EAGER
from benchmarks.schema import CaseResult, Record
from benchmarks.subject import PHASES

ROOFLINE = "roofline"
# A rival that nobody timed: the bare kernel, and what torch and this library may add to a call.
CALL = f"{BARE} + 30 µs"


@dataclass(frozen=True)
class Target:
    """``least``: times faster than an entry, or CALL, or share of the roofline.

    ``sizes`` are those that a case must have; ``phase`` may be "backward".
    """

    op: str
    phase: str
    over: str
    least: float
    sizes: tuple[tuple[str, int], ...] = ()


_S_TO_L = (("M", 64 * 197), ("K", 384), ("N", 1024), ("r", 64))
_IMAGES = (("M", 64 * 197),)
_ON_GPU = [
    Target("stitch_layer_norm", "forward", ROOFLINE, 0.8, _S_TO_L),
    Target("stitch_layer_norm", "forward", EAGER, 2, _S_TO_L),
    Target("stitch_layer_norm", "forward", "torch.compile", 1.3, _S_TO_L),
    Target("stitch_layer_norm", "forward", "merged", 1.2, _S_TO_L),
    Target("stitch_layer_norm", "backward", EAGER, 1.5, _S_TO_L),
    Target("residual_layer_norm", "forward", ROOFLINE, 0.85, _IMAGES),
    Target("residual_layer_norm", "backward", ROOFLINE, 0.75, _IMAGES),
    Target("residual_layer_norm", "forward", EAGER, 1, _IMAGES),
    Target("residual_layer_norm", "forward+backward", EAGER, 1, _IMAGES),
    *(
        Target("multi_stitch", "forward", over, least, (("groups", groups),))
        for groups in (8, 12, 16)
        for over, least in ((EAGER, 1.5), ("merged", 1), ("one stitch", 0.9))
    ),
]
_ROWS = 8 * 197
_ON_CPU = [
    *(
        Target("stitch_layer_norm", phase, over, least, (("M", _ROWS), ("K", K), ("r", 64)))
        for K in (384, 1024)
        for phase, over, least in (
            ("inference", EAGER, 1.33),
            ("inference", "merged", 0.97),
            ("inference", "torch.compile", 0.97),
            ("forward", EAGER, 1.25),
            ("forward", "merged", 0.97),
            ("forward", "torch.compile", 0.97),
            ("forward+backward", EAGER, 1.3),
            ("forward+backward", "torch.compile", 0.97),
        )
    ),
    *(
        Target("residual_layer_norm", phase, over, least, (("M", _ROWS), ("N", N), ("s", 0)))
        for N in (384, 768, 1024)
        for phase, least_over_eager in (
            ("inference", 1.5),
            ("forward", 1.5),
            ("forward+backward", 1.3),
        )
        for over, least in ((EAGER, least_over_eager), ("torch.compile", 1))
    ),
    *(
        Target("multi_stitch", phase, "merged", 0.97, (("M", _ROWS),))
        for phase in ("inference", "forward")
    ),
    *(Target("linear", phase, EAGER, 0.97, (("M", _ROWS),)) for phase in PHASES),
    *(
        Target(op, "forward", CALL, 1, (("M", 1),))
        for op in ("stitch", "residual_layer_norm", "stitch_layer_norm", "multi_stitch")
    ),
]
TARGETS = {"cuda": _ON_GPU, "cpu": _ON_CPU}


def lines(record: Record) -> list[str]:
    """A line for every target and every case that it is about."""
    found = [line for target in TARGETS[record.device] for line in _lines(record, target)]
    return found or ["no case of the record is one that a target is about"]


def _lines(record: Record, target: Target) -> Iterator[str]:
    for case in record.cases:
        first = "forward" if target.phase == "backward" else target.phase
        if (case.op, case.phase) != (target.op, first):
            continue
        if any(case.sizes.get(name) != size for name, size in target.sizes):
            continue
        if case.copies == 0 and target.over != CALL:
            continue  # what caches answer says little of a model
        reached = max(
            (
                (ratio, entry.name)
                for entry in case.entries
                if entry.ours and (ratio := _ratio(record, case, entry.name, target)) is not None
            ),
            default=None,
        )
        sizes = " ".join(f"{name}{size}" for name, size in case.sizes.items())
        what = f"{case.op} {case.shape} {sizes} {target.phase}, " + (
            "share of the roofline" if target.over == ROOFLINE else f"times over {target.over}"
        )
        if reached is None:
            yield f"not measured          {what}"
        else:
            verdict = "met   " if reached[0] >= target.least else "MISSED"
            yield f"{verdict} {reached[0]:5.2f} of {target.least:<4}  {what} ({reached[1]})"


def _ratio(record: Record, case: CaseResult, name: str, target: Target) -> float | None:
    ours = _seconds(record, case, name, target.phase)
    rival = _seconds(record, case, target.over, target.phase)
    return None if ours is None or rival is None else rival / ours


def _seconds(record: Record, case: CaseResult, name: str, phase: str) -> float | None:
    """Of an entry, or what the roofline allows; a backward pass by difference."""

    def of(case: CaseResult) -> float | None:
        if name == ROOFLINE:
            return case.floor_seconds
        timed, more = (BARE, 30e-6) if name == CALL else (name, 0.0)
        entry = next((entry for entry in case.entries if entry.name == timed), None)
        return entry.seconds.median + more if entry and entry.seconds else None

    if phase != "backward":
        return of(case)
    key = (case.op, case.shape, case.sizes, case.dtype, "forward+backward")
    both = (c for c in record.cases if (c.op, c.shape, c.sizes, c.dtype, c.phase) == key)
    whole, first = next(map(of, both), None), of(case)
    return None if whole is None or first is None or whole <= first else whole - first


def main(arguments: Sequence[str] | None = None) -> int:
    """Prints the lines of a record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.targets", description=__doc__)
    parser.add_argument("record", type=Path)
    for line in lines(Record.load(parser.parse_args(arguments).record)):
        print(line)
    return 0


if __name__ == "__main__":
    sys.exit(main())
