"""What is timed, and that nothing wrong ever is."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import machine
from benchmarks.case import BARE, Bench, Case, Entry, cases
from benchmarks.subject import PHASES, Outputs, Phase, Shape, Subject, Tensors, subjects
from snkernels.kernels import native
from snkernels.ops.library import OFFERED

SUBJECTS = subjects()
TINY = Shape("S→L", {"M": 30, "K": 40, "N": 50, "r": 4})


@pytest.fixture(params=["stitch", "stitch_layer_norm"])
def subject(request: pytest.FixtureRequest) -> Subject:
    return SUBJECTS[request.param]


def tiny(subject: Subject, phase: Phase = "forward+backward", r: int = 4) -> Case:
    shape = dataclasses.replace(TINY, sizes={**TINY.sizes, "r": r})
    return Case(subject, shape, torch.float32, torch.device("cpu"), phase)


@pytest.mark.parametrize("op", SUBJECTS)
def test_every_benchmark_file_is_of_an_op(op: str) -> None:
    assert op in OFFERED
    found = cases(SUBJECTS[op], torch.device("cpu"))
    assert {case.phase for case in found} == set(PHASES)
    assert len({str(case) for case in found}) == len(found)


def test_every_kernel_stands_beside_the_five_baselines(subject: Subject) -> None:
    assert native.IMPORT_ERROR is None, native.IMPORT_ERROR
    largest = cases(subject, torch.device("cpu"))[0]
    names = [entry.name for entry in largest.entries()]
    baselines = ["eager", "addmm", "merged", "merge each call", "torch.compile"]
    assert names == [*baselines, "torch backend", "cpu backend"]
    assert [entry.name for entry in largest.entries() if entry.ours] == ["cpu backend"]
    assert len([case for case in cases(subject, torch.device("cpu")) if case.shape.compiled]) == 9


@pytest.mark.parametrize("op", [op for op, subject in SUBJECTS.items() if subject.bare])
def test_a_call_stands_beside_the_bare_kernel(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = cases(SUBJECTS[op], torch.device("cpu"))
    bare = {case: e for case in found for e in case.entries() if e.name == BARE}
    assert [(case.shape.label, case.phase) for case in bare] == [("call", "forward")]
    for case, entry in bare.items():
        bench = Bench(case)
        (call,) = bench.calls(entry)
        outputs = call()
        for output in outputs:
            output.fill_(torch.nan)
        again = call()
        assert [y.data_ptr() for y in again] == [y.data_ptr() for y in outputs]
        assert bench.check(dataclasses.replace(entry, bind=lambda _, y=again: lambda: y)) is None
        assert bench.check(entry) is None
    monkeypatch.setattr(native, "IMPORT_ERROR", "it is not there")
    names = {e.name for case in bare for e in case.entries()}
    assert not names & {BARE, "cpu backend"}


@pytest.mark.parametrize("phase", PHASES)
@pytest.mark.parametrize("r", [0, 4])
def test_all_entries_pass_the_check(subject: Subject, phase: Phase, r: int) -> None:
    case = tiny(subject, phase, r)
    bench = Bench(case)
    for entry in case.entries():
        assert bench.check(entry) is None, entry.name
        call = bench.calls(entry)[0]
        with bench.scope(entry):
            outputs = call()
        learned = {"inference": 0, "forward": 0, "forward+backward": 1}[phase]
        wanted = sum(leaf.requires_grad for leaf in bench.arguments[0].values())
        count = len(subject.eager(bench.arguments[0])) + learned * wanted
        assert len(outputs) == count
        assert outputs[0].requires_grad == (phase != "inference")


def test_training_learns_all_but_the_frozen_weight(subject: Subject) -> None:
    arguments = Bench(tiny(subject)).arguments[0]
    assert [name for name, leaf in arguments.items() if not leaf.requires_grad] == ["weight"]


def test_calls_take_turns_with_more_arguments_than_caches_hold(
    subject: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = tiny(subject, "forward")
    size = sum(tensor.nbytes for tensor in subject.make(case.shape).values())
    monkeypatch.setattr(machine, "cache_bytes", lambda device: size + 1)
    bench = Bench(case)
    assert len(bench.arguments) == 4
    taken: list[int] = []
    read: list[int] = []
    monkeypatch.setattr(bench, "_evict", lambda: read.append(len(taken)))
    entries = [
        dataclasses.replace(
            entry, bind=lambda t: lambda: (taken.append(t["x"].data_ptr()), (t["x"],))[1]
        )
        for entry in case.entries()[:3]
    ]
    for _ in range(2):
        for entry in entries:
            bench.candidate(entry).sample()
    x = [arguments["x"].data_ptr() for arguments in bench.arguments]
    assert taken == x * 3  # before every sample the entry runs once
    assert read == [1, 3, 5, 7, 9, 11]  # and behind that the caches are emptied
    assert Bench(case)._evict().item() >= 2 * size // 4
    cached = dataclasses.replace(case, shape=dataclasses.replace(case.shape, cached=True))
    assert len(Bench(cached).arguments) == 1
    assert Bench(cached).before(lambda: None) is None


def test_the_largest_cache_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_CACHES", tmp_path)
    cpu = torch.device("cpu")
    assert machine.cache_bytes(cpu) == 2**25
    for index, size in enumerate(("32K", "98304K", "1024K")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(f"{size}\n")
    assert machine.cache_bytes(cpu) == 96 * 2**20


def spoiled(entry: Entry, backend: str | None, factor: float) -> Entry:
    """The entry with outputs off by a factor, as a baseline or as a kernel."""

    def bind(t: Tensors) -> Callable[[], Outputs]:
        call = entry.bind(t)
        return lambda: tuple(output * factor for output in call())

    return Entry("spoiled", bind, backend, entry.lacks)


@pytest.mark.parametrize("phase", PHASES)
def test_what_is_wrong_is_refused(subject: Subject, phase: Phase) -> None:
    bench = Bench(tiny(subject, phase))
    eager = bench.case.entries()[0]
    for backend in (None, "cpu"):
        for factor in (1.01, float("nan")):
            with pytest.raises(AssertionError, match="output 0: error"):
                bench.check(spoiled(eager, backend, factor))


def test_a_baseline_may_be_inexact_with_a_note_but_no_kernel(subject: Subject) -> None:
    bench = Bench(tiny(subject))
    eager = bench.case.entries()[0]
    note = bench.check(spoiled(eager, None, 1 + 1e-5))
    assert note is not None
    assert "error" in note
    with pytest.raises(AssertionError, match="error"):
        bench.check(spoiled(eager, "cpu", 1 + 1e-5))


def test_a_gradient_that_is_missing_must_be_declared(subject: Subject) -> None:
    bench = Bench(tiny(subject))
    merged = next(entry for entry in bench.case.entries() if entry.name == "merged")
    assert bench.check(merged) is None
    with pytest.raises(AssertionError, match="no grad of lora_A"):
        bench.check(dataclasses.replace(merged, lacks=("lora_B",)))


def test_a_linear_layer_learns_all_and_has_the_work_of_three_gemms() -> None:
    case = tiny(SUBJECTS["linear"])
    bench = Bench(case)
    assert all(leaf.requires_grad for leaf in bench.arguments[0].values())
    assert [entry.name for entry in case.entries()] == ["eager", "torch backend", "cpu backend"]
    for entry in case.entries():
        assert bench.check(entry) is None, entry.name
    x, y, weight, gemm = 30 * 40, 30 * 50, 40 * 50, 2 * 30 * 40 * 50
    work = SUBJECTS["linear"].work
    forward, step = work(TINY, "forward", 4), work(TINY, "forward+backward", 4)
    assert (forward.flops, forward.bytes) == (gemm, 4 * (x + weight + y))
    assert (step.flops, step.bytes) == (3 * gemm, 4 * (3 * x + 3 * weight + 2 * y))


def test_work_counts_every_gemm_and_tensor_once() -> None:
    work = SUBJECTS["stitch_layer_norm"].work
    x, y, weight, low_rank = 30 * 40, 30 * 50, 40 * 50, 4 * 90
    gemm = 2 * 30 * 40 * 50
    inference = work(TINY, "inference", 4)
    assert (inference.flops, inference.bytes) == (gemm, 4 * (x + weight + 2 * y))
    forward = work(TINY, "forward", 4)
    assert forward.flops == gemm + 2 * 4 * 40 * 50
    assert forward.bytes == inference.bytes + 4 * low_rank
    step = work(TINY, "forward+backward", 2)
    assert step.flops == forward.flops + gemm + 4 * 30 * low_rank
    assert step.bytes == 2 * (2 * x + weight + 3 * y + 2 * low_rank + forward.bytes // 4)
