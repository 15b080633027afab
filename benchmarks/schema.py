"""What a record holds, and its JSON. Tables and plots are made from nothing else."""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.roofline import Ceilings
from benchmarks.timing import Spread

SCHEMA = 2
RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class EntryResult:
    """Seconds per call; how many times faster than others; or why it was not timed (``failed``).

    Every entry is compared with eager torch, a kernel of this library with every entry.
    ``launch_seconds`` is the time of the CPU to launch a call on a GPU, without a graph.
    ``note`` tells where a baseline is less exact than the tests would allow a kernel to be.
    """

    name: str
    ours: bool
    seconds: Spread | None = None
    speedup: dict[str, Spread] = dataclasses.field(default_factory=dict)
    launch_seconds: Spread | None = None
    note: str | None = None
    failed: str | None = None


@dataclass(frozen=True)
class CaseResult:
    """Entries that took turns. ``floor_seconds`` is what the roofline allows.

    ``copies``: how many sets of arguments beside the first took turns, so that caches could not
    answer; none where they were to.
    """

    op: str
    shape: str
    sizes: dict[str, int]
    dtype: str
    phase: str
    rounds: int
    copies: int
    floor_seconds: float
    entries: list[EntryResult]


@dataclass(frozen=True)
class Record:
    """One run of ``python -m benchmarks.record``. Times are in seconds, rates per second."""

    schema: int
    date: str
    command: str
    commit: str | None
    dirty: bool | None
    device: str
    threads: int
    machine: dict[str, Any]
    versions: dict[str, str | None]
    ceilings: Ceilings
    cases: list[CaseResult]

    def put(self, case: CaseResult) -> None:
        """Adds a case, in place of an earlier one of the same."""
        self.cases[:] = [other for other in self.cases if _key(other) != _key(case)]
        self.cases.append(case)

    def save(self, path: Path) -> None:
        """Writes JSON."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "Record":
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: another schema, or no record at all.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"{path} must be a benchmark record of schema {SCHEMA}, but is not")
        try:
            data["ceilings"] = Ceilings(**data["ceilings"])
            data["cases"] = [_case(case) for case in data["cases"]]
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a benchmark record: {error}") from error


def _key(case: CaseResult) -> tuple[object, ...]:
    return case.op, case.shape, case.sizes, case.dtype, case.phase


def _case(data: dict[str, Any]) -> CaseResult:
    return CaseResult(**{**data, "entries": [_entry(entry) for entry in data["entries"]]})


def _entry(data: dict[str, Any]) -> EntryResult:
    speedup = {name: Spread(**spread) for name, spread in data["speedup"].items()}
    spreads = {name: data[name] and Spread(**data[name]) for name in ("seconds", "launch_seconds")}
    return EntryResult(**{**data, **spreads, "speedup": speedup})
