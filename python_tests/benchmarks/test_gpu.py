"""The GPU script's own logic, with stages that only pretend: no GPU takes part."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import every_kernel, gpu
from benchmarks.case import cases
from benchmarks.gpu import Run, Stage
from benchmarks.subject import subjects
from snkernels.ops.library import OFFERED


def python(name: str, code: str, seconds: float = 20.0) -> Stage:
    return Stage(name, [sys.executable, "-S", "-u", "-c", code], seconds, {"GREETING": "hello"})


GOOD = "import os; print(os.environ['GREETING']); print('==== 3 passed ====')"
BAD = "import sys; print('FAILED a.py::b'); print('1 failed, 2 passed'); sys.exit(1)"
SLOW = "import time; print('[gw1] [  3%] FAILED a.py::b')\nwhile True: time.sleep(9)"
STUCK = "import time; print('[gw1] [  3%] PASSED a.py::b'); time.sleep(99)"
# Ends only when it is made to, and its child with it.
DEAF = (
    "import signal, subprocess, sys, time; signal.signal(signal.SIGINT, signal.SIG_IGN);"
    "child = subprocess.Popen([sys.executable, '-S', '-c', 'import time; time.sleep(99)']);"
    "print(child.pid); time.sleep(99)"
)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "logs", 60, heartbeat=0.3)


def test_how_each_stage_ends_is_told(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run.alone(python("good", GOOD))
    run.together([python("bad", BAD), python("slow", SLOW, 1.0)])
    run.alone(python("crash", "import os; print('x'); os.kill(os.getpid(), 11)"))
    run.leave_out("absent", "it is not installed")
    found = {r.name: (r.outcome, r.note) for r in run.results}
    assert found == {
        "good": ("passed", "3 passed"),
        "bad": ("failed", "1 failed, 2 passed"),
        "slow": ("timed out", "KeyboardInterrupt"),
        "crash": ("failed", "died of signal 11"),
        "absent": ("left out", "it is not installed"),
    }
    assert "hello" in run.log_of("good")
    said = capsys.readouterr().out
    assert "good: begins, 20 s at most" in said
    assert "slow: [gw1] [  3%] FAILED a.py::b" in said  # while it ran
    assert len(run.table().splitlines()) == 5

    run.save(tmp_path)
    saved = json.loads((tmp_path / "stages.json").read_text())
    assert {s["name"]: (s["outcome"], s["note"]) for s in saved["stages"]} == found
    assert "==== crash: failed\nx" in (tmp_path / "log.txt").read_text()


def test_a_stage_that_will_not_end_is_ended_with_its_children(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    assert run.alone(python("deaf", DEAF, 1.0)).outcome == "timed out"
    child = Path("/proc") / run.log_of("deaf").strip() / "stat"
    deadline = time.monotonic() + 10
    while child.exists() and child.read_text().rsplit(")", 1)[1].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_stage_outlasts_the_whole_time(tmp_path: Path) -> None:
    run = Run(tmp_path, 1.5)
    assert run.alone(python("slow", SLOW)).outcome == "timed out"
    run = Run(tmp_path, 0.0)
    assert [r.outcome for r in run.together([python("late", GOOD)])] == ["left out"]
    assert run.log_of("late") == ""


def test_every_kernel_for_gpus_is_tested_and_recorded() -> None:
    offered = {
        (op, backend)
        for op, backends in OFFERED.items()
        for backend in backends
        if backend in ("triton", "cuda") and not op.endswith("_backward")
    }
    assert set(gpu.kernels()) == offered
    on_gpus = {op for op, s in subjects().items() if cases(s, torch.device("cuda"))}
    assert set(gpu.RECORDED) == on_gpus == {op for op, _ in offered}
    assert gpu.build().seconds < gpu.SECONDS / 2 < 270


@pytest.fixture
def stages(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """What the stages of a whole run do, by the beginning of their names; no GPU is asked for."""
    codes = {"": GOOD}

    def pretend(stage: Stage) -> Stage:
        code = next(codes[p] for p in sorted(codes, reverse=True) if stage.name.startswith(p))
        return python(stage.name, code + f"; print({list(stage.command)!r})", 20)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu.shutil, "which", lambda name: "/bin/" + name)
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    for name in ("build", "recording", "modelling"):
        original = getattr(gpu, name)
        monkeypatch.setattr(gpu, name, lambda *a, original=original: pretend(original(*a)))
    for name in ("tests", "preparations", "sanitizers"):
        original = getattr(gpu, name)
        monkeypatch.setattr(
            gpu, name, lambda *a, original=original: [pretend(s) for s in original(*a)]
        )
    return codes


def outcomes(folder: Path) -> dict[str, str]:
    saved = json.loads((folder / "stages.json").read_text())
    return {stage["name"]: stage["outcome"] for stage in saved["stages"]}


def test_a_kernel_whose_tests_fail_is_not_timed_and_the_rest_goes_on(
    stages: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stages["tests of stitch_layer_norm, cuda"] = BAD
    stages["compute-sanitizer racecheck"] = BAD
    assert gpu.main(["--out", str(tmp_path)]) == 1
    found = outcomes(tmp_path)
    failed = {name for name, outcome in found.items() if outcome != "passed"}
    assert failed == {"tests of stitch_layer_norm, cuda", "compute-sanitizer racecheck"}
    assert {f"compute-sanitizer {tool}" for tool in gpu.TOOLS} < found.keys()
    commands = [s for s in (tmp_path / "log.txt").read_text().splitlines() if "'--add'" in s]
    struck = {s.split("'--ops', '")[1].split("'")[0]: s for s in commands}
    assert struck.keys() == set(gpu.RECORDED)
    assert "'--struck', 'cuda'" in struck["stitch_layer_norm"]
    assert not any("--struck" in s for op, s in struck.items() if op != "stitch_layer_norm")
    (model,) = (s for s in (tmp_path / "log.txt").read_text().splitlines() if "model_gpu" in s)
    assert "model.json'" in model and "'--struck', 'cuda'" in model
    table = capsys.readouterr().out.rstrip().splitlines()[-len(found) - 2 : -2]
    assert all(line.startswith(name) for line, name in zip(table, found, strict=True))


def test_the_model_runs_no_backend_that_runs_what_failed(
    stages: dict[str, str], tmp_path: Path
) -> None:
    stages["tests of residual_layer_norm, triton"] = BAD
    assert gpu.main(["--out", str(tmp_path)]) == 1
    (model,) = (s for s in (tmp_path / "log.txt").read_text().splitlines() if "model_gpu" in s)
    assert "'--struck', 'cuda', 'triton'" in model


def test_what_is_built_is_not_built_again(stages: dict[str, str], tmp_path: Path) -> None:
    stages["build"] = BAD
    assert gpu.main(["--out", str(tmp_path), "--built"]) == 0
    found = outcomes(tmp_path)
    assert "build" not in found
    assert set(found.values()) == {"passed"}


@pytest.mark.parametrize("kernel", ["none", "stitch_layer_norm:cuda"])
def test_the_tests_of_a_kernel_are_found(kernel: str) -> None:
    """pytest must know the op of every test; on a machine without a GPU it gets no further."""
    found = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "-q", "python_tests/ops"],
        cwd=gpu.ROOT,
        env=os.environ | {"SNKERNELS_TEST_DEVICE": "cuda", "SNKERNELS_TEST_KERNEL": kernel},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout
    assert "test_every_op" in found.stdout


def test_without_a_build_nothing_runs(stages: dict[str, str], tmp_path: Path) -> None:
    stages["build"] = BAD
    assert gpu.main(["--out", str(tmp_path)]) == 1
    found = outcomes(tmp_path)
    assert found.pop("build") == "failed"
    assert set(found.values()) == {"left out"}
    names = {"record of multi_stitch", "record of the model", "compute-sanitizer memcheck"}
    assert names < found.keys()


def test_tests_that_were_cut_off_strike_a_kernel_only_if_one_had_failed(
    stages: dict[str, str], tmp_path: Path
) -> None:
    run = Run(tmp_path, 60)
    stuck = python("tests of stitch_layer_norm, triton", STUCK, 1.0)
    run.together([python("tests of multi_stitch, triton", SLOW, 1.0), stuck])
    for op, backend in gpu.kernels():
        if gpu.tests_of(op, backend) not in [result.name for result in run.results]:
            run.leave_out(gpu.tests_of(op, backend), "no time was left")
    assert {op: names for op, names in gpu.struck(run).items() if names} == {
        "multi_stitch": ["triton"]
    }


def test_without_a_gpu_it_says_so_and_builds_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "out")]) == 2
    assert "No GPU" in capsys.readouterr().out
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("op", gpu.RECORDED)
def test_what_the_sanitizer_watches_runs(op: str) -> None:
    for shape in every_kernel.SHAPES:
        every_kernel.run(subjects()[op], "torch", shape, torch.float32, torch.device("cpu"))
