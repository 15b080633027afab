"""The sweep's logic, with a clock that obeys: candidates, ranking, verdict, record."""

import json
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from device import DEVICE

pytest.importorskip("triton")

from benchmarks import sweep
from benchmarks.sweep import Case, Verdict, judge
from benchmarks.timing import Samples
from snkernels.kernels.triton import configs
from snkernels.kernels.triton.configs import Config

CASE = Case(
    "sum_partials",
    "N8",
    {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8},
    dict,
    lambda t: [],
    lambda t: [],
)


class Clock:
    """Seconds by a rule; what has none is refused."""

    def __init__(self, seconds: dict[tuple[str, int], float], otherwise: float | None) -> None:
        self.seconds, self.otherwise = seconds, otherwise

    def __call__(self, case: Case, candidates: Sequence[Config]) -> tuple[Samples, dict[str, str]]:
        samples, refused = {}, {}
        for i, config in enumerate(candidates):
            changed = [self.seconds[c] for c in config.items() if c in self.seconds]
            seconds = changed[0] if changed else self.otherwise
            if seconds is None:
                refused[str(i)] = "OutOfResources: shared memory"
            else:
                samples[str(i)] = [seconds * noise for noise in (1.0, 1.5, 0.9)]
        return samples, refused


def test_candidates_begin_with_the_choice_and_differ_in_as_many_values_as_asked() -> None:
    assert CASE.candidates(0) == [CASE.chosen]
    one = CASE.candidates(1)
    assert one[0] == CASE.chosen
    assert len(one) == 1 + 2 + 2 + 1
    assert {sum(CASE.chosen[k] != n for k, n in c.items()) for c in one[1:]} == {1}
    two = CASE.candidates(2)
    assert len(two) == len(one) + 2 * 2 + 2 + 2
    assert len({tuple(sorted(c.items())) for c in two}) == len(two)


def test_a_choice_that_is_the_best_holds() -> None:
    verdict = judge(CASE, 1, Clock({("BLOCK_M", 64): 1.0}, 2.0))
    assert verdict.best.config == verdict.timed[0].config == CASE.chosen
    assert verdict.loss == 0
    assert verdict.holds


@pytest.mark.parametrize(("seconds", "holds"), [(0.98, True), (0.9, False)])
def test_a_choice_may_lose_three_percent(seconds: float, holds: bool) -> None:
    verdict = judge(CASE, 1, Clock({("num_warps", 4): seconds}, 1.0))
    assert verdict.best.config["num_warps"] == 4
    assert verdict.loss == pytest.approx(1 / seconds - 1, abs=1e-3)
    assert verdict.holds == holds
    assert [t.speedup for t in verdict.timed[1:]] == sorted(
        (t.speedup for t in verdict.timed[1:]), reverse=True
    )


def test_what_does_not_run_is_kept_with_its_reason_and_never_best() -> None:
    verdict = judge(CASE, 1, Clock({("BLOCK_M", 64): 1.0}, None))
    refused = [t for t in verdict.timed if t.refused]
    assert {t.config["BLOCK_M"] for t in refused} == {32, 128}
    assert all("OutOfResources" in t.refused for t in refused if t.refused)
    assert verdict.holds


def test_a_choice_that_does_not_run_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="sum_partials, N8: the choice fails: OutOfRes"):
        judge(CASE, 1, Clock({("BLOCK_M", 32): 1.0}, None))


def test_every_heuristic_is_swept_and_every_value_is_one_that_it_has() -> None:
    cases = list(sweep.cases(torch.bfloat16, 64))
    assert {case.heuristic for case in cases} == set(sweep.SPACE)
    assert set(sweep.SPACE) == set(configs.heuristics())
    for case in cases:
        assert set(sweep.SPACE[case.heuristic]) <= set(case.chosen), case


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_cases_compute_what_they_are_compared_with(dtype: torch.dtype) -> None:
    """By the check that a GPU's candidates have to pass, for small shapes in the interpreter."""
    small = (
        sweep._project(dtype, 40, 24, 40),
        sweep._merge(dtype, 24, 40, 4),
        sweep._outer(dtype, 40, 24, 40),
        sweep._normalize(dtype, 40, 24),
        sweep._normalize_backward(dtype, 40, 24),
        sweep._sum_rows(dtype, 256, 24),
        sweep._sum_partials(20, 24),
    )
    assert {case.heuristic for case in small} == set(sweep.SPACE)
    for case in small:
        with torch.device(DEVICE):
            sweep.check(case, case.make())


def test_a_record_and_a_table_and_a_status(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--heuristics", "normalize_rows", "--out", str(tmp_path / "sweep.json")]
    assert sweep.main(arguments, Clock({}, 1e-5)) == 0
    assert "the choice" in capsys.readouterr().out
    assert sweep.main(arguments, Clock({("num_warps", 4): 0.5e-5}, 1e-5)) == 1
    assert "warps=4" in (printed := capsys.readouterr().out)
    assert "CHANGE IT" in printed
    saved = json.loads((tmp_path / "sweep.json").read_text())
    assert not any(case["holds"] for case in saved["cases"])
    assert saved["cases"][0]["timed"][0]["seconds"] == 1e-5
    assert saved["machine"] and saved["command"].startswith("python -m benchmarks.sweep")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([]) == 2
    assert "a sweep needs a GPU" in capsys.readouterr().err


def test_a_verdict_without_gain_loses_nothing() -> None:
    timed = [sweep.Timed({}, 1.0, 1.0), sweep.Timed({}, 1.1, 0.9)]
    assert Verdict("h", "s", timed).loss == 0
