"""What a record of the model layer holds: its JSON, its Markdown and its plot."""

import dataclasses
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.timing import Spread

KIND = "model 1"

TITLES = {
    "whole_space": "Every route of a batch in one pass, against a pass for each",
    "mixed_batch": "16 images on 16 routes in one pass",
    "one_route": "One route as a plan",
    "stochastic_depth": "A training step in which dropped samples skip their branch",
    "memory": "Memory of a pass over the whole space",
    "replay": "A captured forward, replayed, against its eager launch",
    "launch": "What the CPU needs to launch a forward, without waiting for the GPU",
    "accuracy": "Latency of every route, predicted from its parts, against its own runs",
}


@dataclass(frozen=True)
class Comparison:
    """Ways to do the same that took turns.

    ``speedup`` says how many times faster ours is than each other way, ``least`` how many times
    it has to be, ``arithmetic`` how many times fewer multiply-adds it needs.
    """

    section: str
    model: str
    sizes: dict[str, int]
    rounds: int
    seconds: dict[str, Spread]
    speedup: dict[str, Spread]
    least: dict[str, float]
    arithmetic: dict[str, float]
    note: str | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes that a pass adds to the process at its peak, and what they must not exceed."""

    model: str
    batch: int
    max_rows: int
    peak_rows: int
    bytes: int
    bound: int


@dataclass(frozen=True)
class Accuracy:
    """How well a profile predicts routes: the share within 10 %, and relative errors."""

    model: str
    batch: int
    routes: int
    within: float
    median: float
    p95: float
    worst: float


@dataclass(frozen=True)
class ModelRecord:
    """One run of ``python -m benchmarks.model`` or ``model_gpu``. Times are in seconds.

    ``dtype`` is that of autocast on a GPU, where parameters are float32.
    """

    kind: str
    date: str
    command: str
    commit: str | None
    dirty: bool | None
    threads: int
    machine: dict[str, Any]
    versions: dict[str, str | None]
    comparisons: list[Comparison]
    memory: list[Memory]
    accuracy: list[Accuracy] = dataclasses.field(default_factory=list)
    device: str = "cpu"
    dtype: str = "float32"

    def add(self, result: Comparison | Memory | Accuracy) -> None:
        """Adds a result."""
        kinds: dict[type, list[Any]] = {
            Comparison: self.comparisons,
            Memory: self.memory,
            Accuracy: self.accuracy,
        }
        kinds[type(result)].append(result)

    def __bool__(self) -> bool:
        """Whether it holds a result."""
        return bool(self.comparisons or self.memory or self.accuracy)

    def save(self, path: Path) -> None:
        """Writes JSON."""
        text = json.dumps(dataclasses.asdict(self), indent=1, ensure_ascii=False, allow_nan=False)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: Path) -> "ModelRecord":
        """Reads what :meth:`save` wrote.

        Raises:
            ValueError: something else.
        """
        data = json.loads(path.read_text(encoding="utf-8"))
        try:
            if data["kind"] != KIND:
                raise ValueError(f"{path} must be a record of kind {KIND!r}, but is not")
            data["comparisons"] = [_comparison(one) for one in data["comparisons"]]
            data["memory"] = [Memory(**one) for one in data["memory"]]
            # Records from before there was any hold none.
            data["accuracy"] = [Accuracy(**one) for one in data.get("accuracy", ())]
            return cls(**data)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a record of the model: {error}") from error


def _comparison(data: dict[str, Any]) -> Comparison:
    spreads = {
        field: {name: Spread(**spread) for name, spread in data[field].items()}
        for field in ("seconds", "speedup")
    }
    return Comparison(**{**data, **spreads})


def is_model_record(path: Path) -> bool:
    """Whether a file is of this kind rather than a record of ops."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return isinstance(data, dict) and "kind" in data


def misses(record: ModelRecord) -> Iterator[str]:
    """What of a record is not as it must be."""
    for one in record.comparisons:
        for name, least in one.least.items():
            if (median := one.speedup[name].median) < least:
                yield f"{one.section}, {one.model}, {one.sizes}: {median} of {least} over {name}"
    for used in record.memory:
        if used.bytes > used.bound:
            yield f"memory, max_rows {used.max_rows}: {used.bytes} bytes of {used.bound}"


def markdown(record: ModelRecord, section: str | None = None) -> str:
    """The tables of a record, or of one of its sections."""
    present = {one.section for one in record.comparisons}
    present |= {name for name in ("memory", "accuracy") if getattr(record, name)}
    chosen = [name for name in TITLES if name in present and section in (None, name)]
    if not chosen:
        raise ValueError(f"section must be one of the record's, but it is {section!r}")
    commit = "no commit" if record.commit is None else f"commit {record.commit[:10]}"
    where = f"{record.machine['cpu']}, {record.threads} threads"
    if record.device != "cpu":
        where = record.machine["gpu"]["name"]
    parts = [
        f"{where}, {record.dtype}{' by autocast' if record.device != 'cpu' else ''}; "
        f"torch {record.versions['torch']}; {commit}{' with changes' if record.dirty else ''}; "
        f"{record.date[:10]}; load before the run {record.machine['load_average']}. "
        f"`{record.command}`"
    ]
    for name in chosen:
        if name == "memory":
            table = _memory(record.memory)
        elif name == "accuracy":
            table = _accuracy(record.accuracy)
        else:
            table = _table([one for one in record.comparisons if one.section == name])
        parts.append(f"**{TITLES[name]}**\n\n{table}")
        notes = {one.note for one in record.comparisons if one.section == name and one.note}
        parts += sorted(notes)
    return "\n\n".join(parts) + "\n"


def _table(comparisons: list[Comparison]) -> str:
    head = ["model", *comparisons[0].sizes, "against", "theirs, s", "ours, s", "times faster"]
    head += ["quartiles", "must be", "arithmetic", "rounds"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for one in comparisons:
        for name, speedup in one.speedup.items():
            least, arithmetic = one.least.get(name), one.arithmetic.get(name)
            rows.append(
                [
                    one.model,
                    *map(str, one.sizes.values()),
                    name,
                    f"{one.seconds[name].median:.3g}",
                    f"{one.seconds['ours'].median:.3g}",
                    f"{speedup.median:.2f}",
                    f"{speedup.low:.2f}–{speedup.high:.2f}",
                    "–" if least is None else f"≥ {least}",
                    "–" if arithmetic is None else f"{arithmetic:.2f}",
                    str(one.rounds),
                ]
            )
    return _lines(rows)


def _memory(memory: list[Memory]) -> str:
    rows = [["model", "batch", "max_rows", "rows at the peak", "MiB", "bound, MiB"], ["---:"] * 6]
    rows += [
        [
            one.model,
            *map(str, (one.batch, one.max_rows, one.peak_rows)),
            f"{one.bytes / 2**20:,.0f}",
            f"{one.bound / 2**20:,.0f}",
        ]
        for one in memory
    ]
    return (
        f"{_lines(rows)}\n\nWhat a pass adds to the model, at rank 0: of other ranks each stitch "
        "also keeps its merged weight, and copies to tell whether that still holds."
    )


def _accuracy(accuracy: list[Accuracy]) -> str:
    rows = [["model", "batch", "routes", "within 10 %", "median error", "95 % within", "worst"]]
    rows.append(["---", *["---:"] * 6])
    for one in accuracy:
        shares = (f"{share:.1%}" for share in (one.within, one.median, one.p95, one.worst))
        rows.append([one.model, str(one.batch), str(one.routes), *shares])
    return _lines(rows)


def _lines(rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def plot(path: Path) -> None:
    """Draws the PNG beside a record: how many times faster, with quartiles, and what must be."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    record = ModelRecord.load(path)
    rows = [(one, name) for one in record.comparisons for name in one.speedup]
    figure, axes = pyplot.subplots(figsize=(9, 1.5 + 0.35 * len(rows)), layout="constrained")
    for y, (one, name) in enumerate(rows):
        s = one.speedup[name]
        error = [[s.median - s.low], [s.high - s.median]]
        axes.errorbar(s.median, y, xerr=error, marker="D", color="tab:red")
        for value, marker in ((one.least.get(name), "|"), (one.arithmetic.get(name), "x")):
            if value is not None:
                axes.plot(value, y, marker=marker, color="black", markersize=11)
    labels = [
        f"{one.section}, {one.model}, {', '.join(f'{k} {v}' for k, v in one.sizes.items())}: {name}"
        for one, name in rows
    ]
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.axvline(1, color="grey", linewidth=1)
    axes.invert_yaxis()
    axes.set_xlabel("times faster (| what must be reached, x multiply-adds saved)")
    figure.savefig(path.with_suffix(".png"), dpi=110)
    pyplot.close(figure)
