"""Times every op beside its baselines, interleaved, and writes a record, its table and its plot.

    python -m benchmarks.record --out benchmarks/results/cpu.json

Run it on a machine that does nothing else. On 2 cores it takes some minutes, one or two of
them in torch.compile the first time. The file is written after every case, so that what
breaks later loses nothing.
"""

import argparse
import datetime
import shlex
import sys
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import machine, plot, roofline, table
from benchmarks.case import EAGER, Bench, Case, Entry, cases
from benchmarks.roofline import Ceilings
from benchmarks.schema import RESULTS, SCHEMA, CaseResult, EntryResult, Record
from benchmarks.subject import subjects
from benchmarks.timing import Candidate, Samples, Spread, interleave, speedup
from snkernels.kernels import native
from snkernels.progress import progress_bar

TESTS_FAILED = "its tests failed on this machine"


@dataclass(frozen=True)
class Sitting:
    """What the entries of a case took while they took turns; those that failed took no part."""

    copies: int
    samples: Samples
    launches: Samples
    notes: dict[str, str | None]
    failed: dict[str, str]

    def and_then(self, later: "Sitting") -> "Sitting":
        """This one and a later one as one; what failed in either takes no part in both."""
        failed = later.failed | self.failed

        def joined(before: Samples, after: Samples) -> Samples:
            return {n: values + after[n] for n, values in before.items() if n not in failed}

        samples = joined(self.samples, later.samples)
        launches = joined(self.launches, later.launches)
        notes = {name: note or later.notes.get(name) for name, note in self.notes.items()}
        return Sitting(self.copies, samples, launches, notes, failed)


def time_case(
    case: Case, seconds: float, rounds: int, struck: Collection[str] = (), sitting: int = 0
) -> Sitting:
    """Checks all entries, then times those that passed; those of ``struck`` backends never run."""
    bench = Bench(case)
    entries = case.entries()
    candidates: dict[str, Candidate] = {}
    notes: dict[str, str | None] = {}
    failed: dict[str, str] = {}
    for entry in entries:
        if entry.backend in struck:
            failed[entry.name] = TESTS_FAILED
            continue
        try:
            notes[entry.name] = bench.check(entry)
            candidates[entry.name] = bench.candidate(entry)
        except Exception as error:  # whatever it is, the others can still be timed
            if entry.name == EAGER:
                raise
            failed[entry.name] = f"{type(error).__name__}: {error}".splitlines()[0]
    samples = interleave(list(candidates.values()), seconds=seconds, least=rounds, seed=sitting)
    launches: Samples = {}
    if case.device.type == "cuda":
        passed = [bench.launch(entry) for entry in entries if entry.name in candidates]
        launches = interleave(passed, seconds=seconds / 4, least=rounds)
    return Sitting(bench.copies, samples, launches, notes, failed)


def result(case: Case, sitting: Sitting, ceilings: Ceilings) -> CaseResult:
    """What a record says of a case."""
    return CaseResult(
        op=case.subject.op,
        shape=case.shape.label,
        sizes=case.shape.sizes,
        dtype=str(case.dtype).removeprefix("torch."),
        phase=case.phase,
        rounds=len(sitting.samples[EAGER]),
        copies=sitting.copies,
        floor_seconds=ceilings.floor(
            case.subject.work(case.shape, case.phase, case.dtype.itemsize)
        ),
        entries=[_entry(entry, sitting) for entry in case.entries()],
    )


def _entry(entry: Entry, sitting: Sitting) -> EntryResult:
    name, samples = entry.name, sitting.samples
    if name in sitting.failed:
        return EntryResult(name, entry.ours, failed=sitting.failed[name])
    others = [other for other in samples if other != name and (entry.ours or other == EAGER)]
    return EntryResult(
        name=name,
        ours=entry.ours,
        seconds=Spread.of(samples[name]),
        speedup={other: speedup(samples, name, other) for other in others},
        launch_seconds=Spread.of(sitting.launches[name]) if sitting.launches else None,
        note=sitting.notes[name],
    )


def prepare(case: Case, struck: Collection[str]) -> None:
    """Compiles and checks what a later process will time, into the caches of the compilers."""
    bench = Bench(case)
    for entry in case.entries():
        if entry.backend not in struck:
            bench.check(entry)


def _lasting(described: dict[str, Any]) -> dict[str, Any]:
    """What of a machine is the same in each run."""
    return {fact: value for fact, value in described.items() if fact != "load_average"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 1 where an entry failed its check, a case broke, or time ran out."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    known = subjects()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.record", description=__doc__)
    parser.add_argument("--ops", nargs="+", choices=known, default=list(known))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/DEVICE.json")
    parser.add_argument("--add", action="store_true", help="to the record that is there already")
    parser.add_argument("--seconds", type=float, default=2.5, help="per case and sitting")
    parser.add_argument("--rounds", type=int, default=15, help="per case and sitting, at least")
    parser.add_argument(
        "--sittings",
        type=int,
        default=1,
        help="how often all cases are timed, one after the other: what else a shared machine does "
        "lasts for minutes, and is then a part of each case instead of all of some",
    )
    parser.add_argument("--limit", type=float, help="seconds after which no case begins any more")
    parser.add_argument(
        "--struck", nargs="+", default=[], metavar="BACKEND", help="do not run it: its tests failed"
    )
    parser.add_argument("--prepare", action="store_true", help="compile everything, time nothing")
    options = parser.parse_args(arguments)
    if options.sittings < 1:
        parser.error(f"--sittings must be at least 1, but it is {options.sittings}")
    if native.IMPORT_ERROR is not None:
        sys.exit(f"the compiled module did not import: {native.IMPORT_ERROR}")

    begin = time.perf_counter()
    device = machine.default_device()
    now = datetime.datetime.now(datetime.timezone.utc).replace(microsecond=0)
    out = options.out or RESULTS / f"{device.type}.json"
    (commit, dirty), described = machine.commit(), machine.describe()
    todo = [case for op in options.ops for case in cases(known[op], device)]
    if not todo:
        sys.exit(f"no kernel of {', '.join(options.ops)} runs on {device.type}")
    added = options.add and out.exists()
    if options.prepare:
        record = None
    elif added:
        record = Record.load(out)
        for fact, then, here in (
            ("commit", record.commit, commit),
            ("dirty", record.dirty, dirty),
            ("device", record.device, device.type),
            ("threads", record.threads, torch.get_num_threads()),
            ("versions", record.versions, machine.versions()),
            ("machine", _lasting(record.machine), _lasting(described)),
        ):
            if then != here:
                sys.exit(f"nothing is added to {out}: its {fact} is {then}, here it is {here}")
    else:
        record = Record(
            schema=SCHEMA,
            date=now.isoformat(),
            command=shlex.join(["python", "-m", "benchmarks.record", *arguments]),
            commit=commit,
            dirty=dirty,
            device=device.type,
            threads=torch.get_num_threads(),
            machine=described,
            versions=machine.versions(),
            ceilings=roofline.measure(device, todo[0].dtype),
            cases=[],
        )
    sittings: dict[Case, Sitting] = {}
    failures: list[str] = []
    turns = [(i, case) for i in range(1 if options.prepare else options.sittings) for case in todo]
    for sitting, case in progress_bar(turns, "benchmarks"):
        if options.limit is not None and time.perf_counter() > begin + options.limit:
            failures.append(f"no time was left for {case} and what comes after it")
            break
        if record is not None and case is todo[0] and sitting > 0 and not added:
            # A ceiling is the best that was seen, and all cases have the same.
            best = record.ceilings.raised(roofline.measure(device, case.dtype))
            record = replace(record, ceilings=best)
            for other, timed in sittings.items():
                record.put(result(other, timed, best))
        try:
            if record is None:
                prepare(case, options.struck)
                continue
            done = time_case(case, options.seconds, options.rounds, options.struck, sitting)
        except Exception as error:  # the other cases can still be timed
            failures.append(f"{case}: {type(error).__name__}: {error}".splitlines()[0])
            continue
        if case in sittings:
            done = sittings[case].and_then(done)
        sittings[case] = done
        record.put(result(case, done, record.ceilings))
        record.save(out)
        failures += [f"{case}: {name}: {why}" for name, why in done.failed.items()]
    if record is not None and record.cases:
        table.write(out)
        plot.write(out)
        print(table.markdown(record))
        print(f"Wrote {out}, and beside it the table (.md) and the plot (.png).")
    for failure in dict.fromkeys(failures):
        print(failure, file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
