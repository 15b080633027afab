"""All that a GPU machine can show, in one command, in under nine minutes and without a network.

    python -m benchmarks.gpu --out gpu-run

Builds the package, runs the tests on the GPU (every kernel's in a process of its own, as a kernel
that reads where it must not breaks all later work of its process) while compute-sanitizer looks at
every kernel, writes the record, and times the model layer. Each stage has a budget; one that fails
or is cut off does not hold up the others, but a kernel whose tests failed is not timed. At the end
stand a table of the stages, and in the folder record.json and model.json with their tables and
plots, stages.json and log.txt.

It needs pip, a CUDA toolkit, and the packages of ``pip install .[dev]``; nothing is fetched. The
package is installed as editable: the sources of this folder find the compiled module beside them.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

import snkernels.ops  # noqa: F401 - fills OFFERED
from benchmarks import model_record, targets
from benchmarks.case import GPU_BACKENDS
from benchmarks.model_record import ModelRecord
from benchmarks.schema import Record
from snkernels.ops.library import OFFERED

SECONDS = 520.0
ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck", "synccheck")
# Of the time behind the build.
TESTING = 0.4
# Most wanted first: what runs out of time is at the end.
RECORDED = ("stitch_layer_norm", "residual_layer_norm", "multi_stitch")

Outcome = Literal["passed", "failed", "timed out", "left out"]


@dataclass(frozen=True)
class Stage:
    """A command, and the seconds that it may take."""

    name: str
    command: Sequence[str]
    seconds: float
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """How a stage ended; ``note`` is the last line that it wrote, or why it did not run."""

    name: str
    outcome: Outcome
    seconds: float
    note: str


class Run:
    """Runs stages while there is time, says so as it goes, and keeps how each ended."""

    def __init__(self, logs: Path, seconds: float, heartbeat: float = 15.0) -> None:
        self.logs = logs
        self.results: list[Result] = []
        self._begin = time.monotonic()
        self._end = self._begin + seconds
        self._heartbeat = heartbeat
        logs.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        """Seconds until everything must be over."""
        return self._end - time.monotonic()

    def leave_out(self, name: str, why: str) -> Result:
        """Notes a stage that does not run."""
        return self._note(Result(name, "left out", 0.0, why))

    def together(self, stages: Sequence[Stage]) -> list[Result]:
        """Runs stages at the same time, each until its budget or the whole time is over."""
        if self.left < 1:
            return [self.leave_out(stage.name, "no time was left") for stage in stages]
        with contextlib.ExitStack() as stack:
            jobs = [stack.enter_context(_Job.begin(s, self._log(s), self.left)) for s in stages]
            for job in jobs:
                self._say(f"{job.stage.name}: begins, {job.seconds:.0f} s at most")
            running, spoken = list(jobs), time.monotonic()
            results: dict[str, Result] = {}
            while running:
                time.sleep(0.05)
                for job in list(running):
                    if (result := job.poll()) is not None:
                        running.remove(job)
                        results[job.stage.name] = self._note(result)
                if running and time.monotonic() - spoken > self._heartbeat:
                    spoken = time.monotonic()
                    for job in running:
                        self._say(f"{job.stage.name}: {job.last_line()}")
        return [results[stage.name] for stage in stages]

    def alone(self, stage: Stage) -> Result:
        """Runs one stage."""
        return self.together([stage])[0]

    def log_of(self, name: str) -> str:
        """What a stage wrote so far; nothing if it did not run."""
        path = self._path(name)
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    def table(self) -> str:
        """A line for each stage."""
        width = max(len(result.name) for result in self.results)
        return "\n".join(
            f"{r.name:{width}}  {r.outcome:9}  {r.seconds:5.0f} s  {r.note}" for r in self.results
        )

    def save(self, folder: Path) -> None:
        """Writes stages.json and log.txt, all that the stages wrote, in their order."""
        stages = [dataclasses.asdict(result) for result in self.results]
        text = json.dumps({"seconds": self._passed(), "stages": stages}, indent=1)
        (folder / "stages.json").write_text(text + "\n", encoding="utf-8")
        parts = [f"==== {r.name}: {r.outcome}\n{self.log_of(r.name)}" for r in self.results]
        (folder / "log.txt").write_text("\n".join(parts), encoding="utf-8")

    def _path(self, name: str) -> Path:
        return self.logs / (re.sub(r"\W+", "-", name) + ".log")

    def _log(self, stage: Stage) -> Path:
        return self._path(stage.name)

    def _passed(self) -> float:
        return round(time.monotonic() - self._begin, 1)

    def _say(self, text: str) -> None:
        print(f"[{self._passed():5.0f} s] {text}", flush=True)

    def _note(self, result: Result) -> Result:
        self.results.append(result)
        self._say(f"{result.name}: {result.outcome}: {result.note}")
        return result


def _hear_interrupts() -> None:
    """A process that a shell started in the background ignores them, and so would its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass
class _Job:
    """A stage under way, in a session of its own, so that all it started can be ended with it."""

    stage: Stage
    log: Path
    seconds: float
    process: subprocess.Popen[bytes]
    begin: float
    asked_to_end: float | None = None

    @classmethod
    @contextlib.contextmanager
    def begin(cls, stage: Stage, log: Path, left: float) -> Iterator["_Job"]:
        with log.open("wb") as file:
            process = subprocess.Popen(
                stage.command,
                cwd=ROOT,
                env=os.environ | stage.environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_hear_interrupts,
            )
        try:
            yield cls(stage, log, min(stage.seconds, left), process, time.monotonic())
        finally:
            _end(process, signal.SIGKILL)
            process.wait()

    def poll(self) -> Result | None:
        """How it ended, or None while it runs. Over its time it is asked to end, then made to."""
        code, seconds = self.process.poll(), time.monotonic() - self.begin
        if code is None:
            if self.asked_to_end is None and seconds > self.seconds:
                self.asked_to_end = seconds
                _end(self.process, signal.SIGINT)
            elif self.asked_to_end is not None and seconds > self.asked_to_end + GRACE:
                _end(self.process, signal.SIGKILL)
            return None
        outcome: Outcome = "failed" if code else "passed"
        if self.asked_to_end is not None:
            outcome = "timed out"
        note = self.last_line() if code >= 0 or self.asked_to_end else f"died of signal {-code}"
        return Result(self.stage.name, outcome, round(seconds, 1), note)

    def last_line(self) -> str:
        """Of the log, without what draws in a terminal."""
        with self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            text = file.read().decode("utf-8", errors="replace")
        lines = [line.strip(" =\t") for line in re.split(r"[\r\n]+", text) if line.strip(" =\t")]
        return lines[-1][:120] if lines else "no output yet"


GRACE = 5.0


def _end(process: subprocess.Popen[bytes], how: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, how)


# ---- The stages of this project --------------------------------------------------------------


def build() -> Stage:
    """Insists on CUDA: without it there would be nothing to see here."""
    pip = ["-m", "pip", "install", "--no-build-isolation", "--no-deps", "-e", "."]
    return Stage("build", [sys.executable, *pip], 170, {"SNKERNELS_CUDA": "ON"})


def kernels() -> list[tuple[str, str]]:
    """(op, backend) of every kernel for GPUs; a backward goes with its op."""
    return [(op, backend) for op in RECORDED for backend in GPU_BACKENDS if backend in OFFERED[op]]


def tests_of(op: str, backend: str) -> str:
    """The name of the stage that tests a kernel."""
    return f"tests of {op}, {backend}"


def tests(seconds: float) -> list[Stage]:
    """The tests of each kernel, and the others; at once, as most of their time is compiling."""
    pytest = [sys.executable, "-m", "pytest", "-v", "--tb=short"]
    ops = [*pytest, "-n", "3", "python_tests/ops"]
    device = {"SNKERNELS_TEST_DEVICE": "cuda"}
    others = (
        "python_tests/kernels/triton",
        "python_tests/models/test_on_a_gpu.py",
        "python_tests/models/test_capture.py",
    )
    return [
        *(
            Stage(tests_of(op, backend), ops, seconds, device | {"SNKERNELS_TEST_KERNEL": kernel})
            for op, backend in kernels()
            for kernel in [f"{op}:{backend}"]
        ),
        Stage("tests of ops, others", ops, seconds, device | {"SNKERNELS_TEST_KERNEL": "none"}),
        *(Stage(f"tests: {path}", [*pytest, path], seconds, device) for path in others),
    ]


def preparations(seconds: float) -> list[Stage]:
    """torch.compile's work, done while the tests run, from whose caches the record takes it."""
    record = [sys.executable, "-m", "benchmarks.record", "--prepare", "--ops"]
    return [Stage(f"compile for {op}", [*record, op], seconds) for op in RECORDED]


def recording(op: str, out: Path, struck: Sequence[str], seconds: float) -> Stage:
    """One op's cases, added to the record, which may take 75 seconds at most."""
    seconds = min(75.0, seconds)
    record = [sys.executable, "-m", "benchmarks.record", "--ops", op, "--out", str(out), "--add"]
    # A case takes as long again to check and to capture, and some ops have thirty.
    record += ["--seconds", f"{seconds / 190:.2f}", "--limit", f"{0.8 * seconds:.0f}"]
    return Stage(f"record of {op}", [*record, *(["--struck", *struck] if struck else [])], seconds)


def modelling(out: Path, struck: Sequence[str], seconds: float) -> Stage:
    """The model layer on every backend of which no kernel failed its tests."""
    model = [sys.executable, "-m", "benchmarks.model_gpu", "--out", str(out)]
    # What has begun by then is finished, and stands in the table.
    model += ["--limit", f"{max(seconds - 25, seconds / 2):.0f}"]
    model += ["--struck", *struck] if struck else []
    return Stage("record of the model", model, seconds)


def sanitizers(sanitizer: str, seconds: float) -> list[Stage]:
    """compute-sanitizer over small runs of every kernel, one process per tool."""
    run = [sys.executable, "-m", "benchmarks.every_kernel"]
    # The allocator would hide an access beyond a tensor inside its blocks.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return [
        Stage(
            f"compute-sanitizer {tool}",
            [sanitizer, "--tool", tool, "--error-exitcode", "9", *run],
            seconds,
            environment,
        )
        for tool in TOOLS
    ]


def struck(run: Run) -> dict[str, list[str]]:
    """By op, the backends whose tests failed.

    One that was cut off before any had failed may be timed: a record checks every result anyway.
    """
    found: dict[str, list[str]] = {op: [] for op in RECORDED}
    results = {result.name: result for result in run.results}
    for op, backend in kernels():
        name = tests_of(op, backend)
        cut_off = results[name].outcome in ("timed out", "left out")
        # pytest says of each test how it ended, before or behind its name.
        failed = bool(re.search(r"(^|\] | )(FAILED|ERROR)\b", run.log_of(name), re.M))
        if results[name].outcome == "failed" or (cut_off and failed):
            found[op].append(backend)
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every stage passed, 2 without a GPU, else 1."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("gpu-run"), help="a folder; gpu-run")
    parser.add_argument("--seconds", type=float, default=SECONDS, help="for everything")
    parser.add_argument("--built", action="store_true", help="build nothing: all is built already")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("No GPU: torch.cuda.is_available() is False here, so there is nothing to do.")
        return 2
    out: Path = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    record, model = out / "record.json", out / "model.json"
    for path in (record, model):
        path.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory() as logs:
        run = Run(Path(logs), options.seconds)
        try:
            _run(run, record, model, options.built)
        finally:
            run.save(out)
    if record.exists():
        print("\nWhat an H200 must reach:", *targets.lines(Record.load(record)), sep="\n")
    if model.exists():
        missed = list(model_record.misses(ModelRecord.load(model)))
        print("\nWhat the model layer missed:", *(missed or ["nothing"]), sep="\n")
    print(f"\n{run.table()}\n\nWrote {out}")
    return 0 if all(result.outcome == "passed" for result in run.results) else 1


def _run(run: Run, record: Path, model: Path, built: bool) -> None:
    if not built and run.alone(build()).outcome != "passed":
        names = [s.name for s in [*tests(0), *preparations(0), *sanitizers("", 0)]]
        for name in [*names, *(f"record of {op}" for op in RECORDED), "record of the model"]:
            run.leave_out(name, "the build did not pass")
        return
    seconds = TESTING * run.left
    stages = [*tests(seconds), *preparations(seconds)]
    if sanitizer := shutil.which("compute-sanitizer"):
        stages += sanitizers(sanitizer, seconds)
    else:
        for stage in sanitizers("", 0):
            run.leave_out(stage.name, "it is not installed")
    run.together(stages)

    todo = struck(run)
    for i, (op, backends) in enumerate(todo.items()):
        run.alone(recording(op, record, backends, run.left / (len(todo) + 1 - i)))
    failed = {backend for backends in todo.values() for backend in backends}
    if "triton" in failed:
        failed.add("cuda")  # whose other kernels are Triton's
    run.alone(modelling(model, sorted(failed), max(5.0, run.left - 5)))


if __name__ == "__main__":
    sys.exit(main())
