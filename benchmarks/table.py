"""Markdown from records: a file beside each, and the blocks of the README.

    python -m benchmarks.table            rewrites all tables, plots and blocks
    python -m benchmarks.table --check    writes nothing; fails where a table is not its record's

A block of the README begins with ``<!-- record:NAME -->``, or ``<!-- record:NAME OP -->`` for one
op alone, and ends with ``<!-- /record -->``. NAME is that of benchmarks/results/NAME.json. A record
of the model layer has sections in place of ops.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import model_record, plot
from benchmarks.case import BARE, EAGER
from benchmarks.model_record import ModelRecord
from benchmarks.schema import RESULTS, CaseResult, EntryResult, Record
from benchmarks.timing import Spread

ABSENT = "–"
README = Path(__file__).parent.parent / "README.md"

_BLOCK = re.compile(
    r"(?P<begin><!-- record:(?P<name>[\w.-]+)(?: (?P<op>\w+))? -->\n)"
    r".*?(?P<end><!-- /record -->)",
    re.DOTALL,
)

LEGEND = (
    "Medians of interleaved rounds. *× name* is how many times faster the kernel is, from the "
    "ratio in each round: above 1 the kernel wins. *roofline* is the share of the measured "
    "ceilings. *merged* merges the low-rank part into the weight once, before the clock starts, "
    "and so gives `lora_A` and `lora_B` no gradient; *torch backend* is the op where no kernel is "
    "chosen; – was not timed (torch.compile compiles for long, so only where a claim rests on it). "
    "*call* is one row, so small that its time is the cost of a call: the mean of 100 in a row. As "
    "in a model, each call has other arguments than those before it, more than caches hold, and on "
    "a CPU comes after one of its own kind and as much other memory as fills them twice, both "
    "untimed; not so *call* and what is *cached*."
)


def markdown(record: Record, op: str | None = None) -> str:
    """The tables of a record, or of one of its ops."""
    chosen = [case for case in record.cases if op in (None, case.op)]
    if not chosen:
        raise ValueError(f"op must be one of the record's, but it is {op!r}")
    groups: dict[tuple[str, str, str], list[CaseResult]] = {}
    for case in chosen:
        groups.setdefault((case.op, case.phase, case.dtype), []).append(case)
    parts = [_provenance(record)]
    for (name, phase, dtype), cases in groups.items():
        parts.append(f"**`{name}`, {phase}, {dtype}**\n\n{_table(cases)}")
        parts += [*_overheads(cases), *_remarks(cases)]
    return "\n\n".join([*parts, LEGEND]) + "\n"


def _provenance(record: Record) -> str:
    gpu, versions = record.machine["gpu"], record.versions
    where = gpu["name"] if gpu else f"{record.machine['cpu']}, {record.threads} threads"
    commit = "no commit" if record.commit is None else f"commit {record.commit[:10]}"
    ceilings = record.ceilings
    return (
        f"{where}; torch {versions['torch']}; {commit}{' with changes' if record.dirty else ''}; "
        f"{record.date[:10]}; load before the run {record.machine['load_average']}; ceilings "
        f"{ceilings.copy / 1e9:,.0f} GB/s copied, {ceilings.gemm / 1e12:.3g} TFLOP/s in torch.mm. "
        f"`{record.command}`"
    )


def _table(cases: Sequence[CaseResult]) -> str:
    """One row per shape and kernel of this library."""
    entries = [entry for case in cases for entry in case.entries]
    others = list(dict.fromkeys(e.name for e in entries if not e.ours and e.name != BARE))
    launched = any(entry.launch_seconds for entry in entries)
    head = ["shape", *cases[0].sizes, "kernel", "µs", "eager µs"]
    head += ["launch µs", "eager launch µs"] if launched else []
    head += [*(f"× {name}" for name in others), "roofline"]
    rows = [head, ["---", *["---:"] * (len(head) - 1)]]
    for case in cases:
        eager = next(entry for entry in case.entries if entry.name == EAGER)
        for ours in (entry for entry in case.entries if entry.ours):
            row = [case.shape, *map(str, case.sizes.values()), ours.name]
            row += [_time(ours, ours.seconds), _time(eager, eager.seconds)]
            if launched:
                row += [_time(e, e.launch_seconds) for e in (ours, eager)]
            row += [_ratio(ours, name) for name in others]
            rows.append([*row, _share(ours, case)])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _overheads(cases: Sequence[CaseResult]) -> list[str]:
    """A line for each kernel that was timed beside itself with nothing around it."""
    lines = []
    for case in cases:
        micros = {e.name: e.seconds.median * 1e6 for e in case.entries if e.seconds}
        lines += [
            f"*{case.shape}*, {ours.name}: {micros[ours.name] - micros[BARE]:.3g} µs over the bare "
            f"kernel, which takes {micros[BARE]:.3g} µs where its outputs stand ready."
            for ours in case.entries
            if ours.ours and {ours.name, BARE} <= micros.keys()
        ]
    return lines


def _remarks(cases: Sequence[CaseResult]) -> list[str]:
    """A line for each entry that failed, and for each that is less exact than it should be."""
    remarks: dict[str, str] = {}
    for case in cases:
        for entry in case.entries:
            if entry.failed:
                remarks[entry.name] = f"{entry.name}: check failed: {entry.failed}"
            elif entry.note:
                remarks[entry.name] = f"{entry.name} is less exact than eager: {entry.note}"
    return list(remarks.values())


def _time(entry: EntryResult, seconds: Spread | None) -> str:
    if seconds is None:
        return "check failed" if entry.failed else ABSENT
    micros = seconds.median * 1e6
    return f"{micros:,.0f}" if micros >= 100 else f"{micros:.3g}"


def _ratio(ours: EntryResult, name: str) -> str:
    return f"{ours.speedup[name].median:.2f}" if name in ours.speedup else ABSENT


def _share(ours: EntryResult, case: CaseResult) -> str:
    return f"{case.floor_seconds / ours.seconds.median:.0%}" if ours.seconds else ABSENT


def beside(record: Path) -> Path:
    """Where the table of a record lies."""
    return record.with_suffix(".md")


def text_of(record: Path, part: str | None = None) -> str:
    """The tables of a record of either kind, or of one op or section."""
    if model_record.is_model_record(record):
        return model_record.markdown(ModelRecord.load(record), part)
    return markdown(Record.load(record), part)


def write(record: Path) -> None:
    """Makes the table of a record anew."""
    beside(record).write_text(text_of(record), encoding="utf-8")


def readme(text: str, results: Path) -> str:
    """A README's text with its blocks made anew from the records in a folder.

    Raises:
        ValueError: a block of a record that is not there or that never ends.
    """

    def block(match: re.Match[str]) -> str:
        record = results / f"{match['name']}.json"
        if not record.exists():
            raise ValueError(f"the README names the record {match['name']!r}, but {record} is not")
        return f"{match['begin']}{text_of(record, match['op'])}{match['end']}"

    made, count = _BLOCK.subn(block, text)
    if count != text.count("<!-- record:"):
        raise ValueError("a block of the README that begins with <!-- record: is malformed")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where ``--check`` found a table that is not its record's."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.table", description=__doc__)
    parser.add_argument("records", nargs="*", type=Path, help="default: all that are committed")
    parser.add_argument("--readme", type=Path, default=README)
    parser.add_argument("--check", action="store_true", help="write nothing, compare")
    options = parser.parse_args(arguments)
    records = options.records or sorted(RESULTS.glob("*.json"))
    texts = {beside(record): text_of(record) for record in records}
    if options.readme.exists():
        texts[options.readme] = readme(options.readme.read_text(encoding="utf-8"), RESULTS)
    stale = [
        path
        for path, text in texts.items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]
    if options.check:
        for path in stale:
            print(f"{path} is not what its records say: python -m benchmarks.table")
        return 1 if stale else 0
    for path in stale:
        path.write_text(texts[path], encoding="utf-8")
        print(f"Wrote {path}")
    for record in records:
        draw = model_record.plot if model_record.is_model_record(record) else plot.write
        draw(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
