import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from benchmarks.roofline import Ceilings
from benchmarks.subject import Work
from benchmarks.timing import Candidate, Spread, host_timer, interleave, speedup


class Clock:
    """Time that passes only when somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now

    def takes(self, seconds: float, log: list[str], name: str) -> Candidate:
        def call() -> None:
            log.append(name)
            self.now += seconds

        return Candidate(name, host_timer(call, self))


def test_candidates_take_turns_after_the_warmup() -> None:
    clock, log = Clock(), []
    candidates = [clock.takes(s, log, name) for s, name in ((1, "A"), (2, "B"), (3, "C"))]
    samples = interleave(candidates, seconds=0, least=3, warmup=2, clock=clock)
    rounds = ["".join(log[i : i + 3]) for i in range(0, len(log), 3)]
    assert [sorted(turn) for turn in rounds] == [list("ABC")] * 5
    assert samples == {"A": [1] * 3, "B": [2] * 3, "C": [3] * 3}


def test_no_candidate_always_comes_after_the_same_other() -> None:
    clock, log = Clock(), []
    candidates = [clock.takes(1, log, name) for name in "ABC"]
    interleave(candidates, seconds=0, least=100, warmup=0, clock=clock)
    after = Counter(itertools.pairwise(log))
    assert all(after[a, b] > 30 for a, b in itertools.permutations("ABC", 2))


def test_rounds_begin_until_the_time_is_over() -> None:
    clock, log = Clock(), []
    candidates = [clock.takes(1, log, "A"), clock.takes(2, log, "B")]
    assert len(interleave(candidates, seconds=30, least=3, clock=clock)["A"]) == 10
    assert len(interleave(candidates, seconds=31, least=3, clock=clock)["A"]) == 11


def test_a_scope_is_entered_for_its_own_candidate_and_not_timed() -> None:
    clock, log = Clock(), []

    @contextmanager
    def scope() -> Iterator[None]:
        log.append("enter")
        clock.now += 100
        yield
        log.append("leave")

    inside = clock.takes(1, log, "A")
    candidates = [Candidate("A", inside.sample, scope), clock.takes(1, log, "B")]
    samples = interleave(candidates, seconds=0, least=2, warmup=0, clock=clock)
    assert "".join(log).replace("enterAleave", "a") in ("aBaB", "aBBa", "BaaB", "BaBa")
    assert samples["A"] == [1, 1]


def test_names_must_differ() -> None:
    twice = [Candidate("A", lambda: 1.0)] * 2
    with pytest.raises(ValueError, match=r"different names.*\['A'\]"):
        interleave(twice, seconds=0, least=1)


def test_a_speedup_is_the_median_of_the_ratios_in_each_round() -> None:
    # The machine was busy in the last two rounds: medians of seconds would say 1.0.
    samples = {"eager": [2.0, 2.0, 2.0, 9.0, 9.0], "ours": [1.0, 1.0, 2.0, 2.0, 4.5]}
    assert speedup(samples, "ours", "eager") == Spread(2.0, 2.0, 2.0)
    assert speedup(samples, "eager", "ours").median == 0.5


def test_a_spread_keeps_median_and_quartiles_to_four_digits() -> None:
    assert Spread.of([5, 1, 3, 2, 4]) == Spread(3, 2, 4)
    assert Spread.of([1.23456789e-5] * 2).median == 1.235e-5


def test_the_result_is_freed_after_the_clock_is_read() -> None:
    clock = Clock()

    class Result:
        def __del__(self) -> None:
            clock.now += 50

    assert host_timer(Result, clock)() == 0
    assert clock.now == 50


def test_what_comes_before_a_sample_is_not_timed() -> None:
    clock = Clock()
    told: list[float] = []

    def before() -> None:
        told.append(clock.now)
        clock.now += 50

    def call() -> None:
        clock.now += 3

    sample = host_timer(call, clock, calls=2, before=before)
    assert sample() == 3
    assert told == [0]


def test_the_floor_is_the_slower_of_bytes_and_flops() -> None:
    ceilings = Ceilings(copy=10, gemm=100)
    assert ceilings.floor(Work(flops=100, bytes=50)) == 5
    assert ceilings.floor(Work(flops=900, bytes=50)) == 9
