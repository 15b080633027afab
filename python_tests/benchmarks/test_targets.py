"""Which figures of a record are held against which target."""

from typing import Any

import pytest

from benchmarks.roofline import Ceilings
from benchmarks.schema import CaseResult, EntryResult, Record
from benchmarks.subject import subjects
from benchmarks.targets import TARGETS, lines
from benchmarks.timing import Spread

SIZES = {"M": 12608, "K": 384, "N": 1024, "r": 64}


def record(*cases: CaseResult, device: str = "cuda") -> Record:
    ceilings: Any = Ceilings(1.0, 1.0)
    return Record(1, "", "", None, None, device, 1, {}, {}, ceilings, list(cases))


def case(
    op: str,
    phase: str,
    floor: float,
    sizes: dict[str, int],
    copies: int = 4,
    **micros: float | None,
) -> CaseResult:
    entries = [
        EntryResult(
            name := label.replace("_", " "),
            name.endswith("backend"),
            None if value is None else Spread(value, value, value),
            failed="wrong" if value is None else None,
        )
        for label, value in micros.items()
    ]
    return CaseResult(op, "S→L", sizes, "bfloat16", phase, 3, copies, floor, entries)


def test_the_fastest_kernel_counts_and_backward_is_the_difference() -> None:
    kernels = {"triton_backend": 30.0, "cuda_backend": 20.0}
    forward = case("stitch_layer_norm", "forward", 15, SIZES, eager=50, merged=22, **kernels)
    both = case("stitch_layer_norm", "forward+backward", 40, SIZES, eager=150, cuda_backend=70)
    found = lines(record(forward, both))
    text = "stitch_layer_norm S→L M12608 K384 N1024 r64 "
    assert found == [
        f"MISSED  0.75 of 0.8   {text}forward, share of the roofline (cuda backend)",
        f"met     2.50 of 2     {text}forward, times over eager (cuda backend)",
        f"not measured          {text}forward, times over torch.compile",
        f"MISSED  1.10 of 1.2   {text}forward, times over merged (cuda backend)",
        f"met     2.00 of 1.5   {text}backward, times over eager (cuda backend)",
    ]


def test_what_caches_answer_is_no_target() -> None:
    sizes = {"M": 12608, "N": 384, "s": 0}
    timed = {"eager": 50.0, "triton_backend": 10.0}
    forward, both = (
        [case("residual_layer_norm", phase, 9, sizes, copies, **timed) for copies in (0, 4)]
        for phase in ("forward", "forward+backward")
    )
    whole = lines(record(forward[1], both[1]))
    assert len(whole) > 2
    assert lines(record(*forward, *both)) == whole
    assert lines(record(forward[0], both[0])) == [
        "no case of the record is one that a target is about"
    ]


def test_a_kernel_that_failed_reaches_nothing() -> None:
    sizes = {"M": 12608, "K": 384, "N": 1024, "r": 64, "groups": 12}
    only = case("multi_stitch", "forward", 15, sizes, eager=50, one_stitch=20, cuda_backend=None)
    assert all(line.startswith("not measured") for line in lines(record(only)))
    assert len(lines(record(only))) == 3
    small = case("multi_stitch", "forward", 15, sizes | {"groups": 4}, eager=50, cuda_backend=9)
    assert lines(record(small)) == ["no case of the record is one that a target is about"]


@pytest.mark.parametrize(
    ("micros", "verdict"), [(25.6, "met     1.25 of 1   "), (40, "MISSED  0.80 of 1   ")]
)
def test_a_call_may_cost_so_much_over_the_bare_kernel(micros: float, verdict: str) -> None:
    sizes = {"M": 1, "K": 8, "N": 8, "r": 4}
    timed = {"eager": 20e-6, "cpu_backend": micros * 1e-6}
    text = "  stitch S→L M1 K8 N8 r4 forward, times over bare kernel + 30 µs"
    (line,) = lines(
        record(case("stitch", "forward", 0, sizes, **timed, bare_kernel=2e-6), device="cpu")
    )
    assert line == f"{verdict}{text} (cpu backend)"
    (line,) = lines(record(case("stitch", "forward", 0, sizes, **timed), device="cpu"))
    assert line == f"not measured        {text}"


@pytest.mark.parametrize(("device", "images"), [("cuda", 64), ("cpu", 8)])
def test_every_target_is_about_a_case_of_the_benchmarks(device: str, images: int) -> None:
    for target in TARGETS[device]:
        shapes = subjects()[target.op].shapes(images)
        about = [s for s in shapes if all(s.sizes.get(n) == size for n, size in target.sizes)]
        assert about, target
        if target.over == "torch.compile":
            assert all(shape.compiled or shape.cached for shape in about), target
