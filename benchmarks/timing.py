"""The one way in which time is measured here.

Candidates take turns, round by round, so that what else the machine does strikes them alike, and
each round has an order of its own: in a fixed one (A B C A B C …) each would always find the caches
as the same other left them. A ratio is taken inside each round, and the median of the rounds is
reported. Medians in seconds from two different runs say little; ratios hold.
"""

import random
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field

import torch

_REPLAYS = 20

Clock = Callable[[], float]
Samples = dict[str, list[float]]


@dataclass(frozen=True)
class Candidate:
    """``sample`` runs it and returns seconds per call; ``scope`` is entered before, untimed."""

    name: str
    sample: Callable[[], float]
    scope: Callable[[], AbstractContextManager[None]] = field(default=nullcontext)


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Spread":
        """Of two values at least, to four digits: no clock here is worth more."""
        low, median, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(*(float(f"{value:.4g}") for value in (median, low, high)))


def interleave(
    candidates: Sequence[Candidate],
    *,
    seconds: float,
    least: int,
    warmup: int = 2,
    clock: Clock = time.perf_counter,
    seed: int = 0,
) -> Samples:
    """Seconds per call of each candidate, one value per round.

    Args:
        candidates: with different names.
        seconds: rounds begin until this time is over.
        least: rounds at any rate; an odd number makes the median one of the rounds.
        warmup: rounds that are not counted.
        clock: for tests.
        seed: of the rounds' orders.
    """
    samples: Samples = {candidate.name: [] for candidate in candidates}
    if len(samples) < len(candidates):
        raise ValueError(f"candidates must have different names, but are {list(samples)}")

    shuffle = random.Random(seed).shuffle

    def one_round() -> dict[str, float]:
        order, taken = list(candidates), {}
        shuffle(order)
        for candidate in order:
            with candidate.scope():
                taken[candidate.name] = candidate.sample()
        return taken

    for _ in range(warmup):
        one_round()
    end, rounds = clock() + seconds, 0
    while rounds < least or clock() < end:
        for name, value in one_round().items():
            samples[name].append(value)
        rounds += 1
    return samples


def speedup(samples: Samples, name: str, over: str) -> Spread:
    """How many times faster ``name`` is than ``over``, from the ratio in each round."""
    return Spread.of([b / a for a, b in zip(samples[name], samples[over], strict=True)])


def host_timer(
    call: Callable[[], object],
    clock: Clock = time.perf_counter,
    calls: int = 1,
    before: Callable[[], object] | None = None,
) -> Callable[[], float]:
    """A sample by the wall clock, per call, of so many calls in a row.

    Untimed are ``before``, called ahead of it, and the freeing of what the last call returns.
    """

    def sample() -> float:
        if before is not None:
            before()
        start = clock()
        for _ in range(calls):
            result = call()
        elapsed = clock() - start
        del result
        return elapsed / calls

    return sample


def gpu_timer(
    replay: Callable[[], object], calls: int, replays: int = _REPLAYS
) -> Callable[[], float]:
    """A sample by GPU events, per call, of a replay that makes that many.

    Replays queue up behind the first, so that the GPU waits for the CPU once in many.
    """
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def sample() -> float:
        start.record()
        for _ in range(replays):
            replay()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3 / (replays * calls)

    return sample


def launch_timer(call: Callable[[], object]) -> Callable[[], float]:
    """A sample of what the CPU needs to launch a call on the GPU, without waiting for it."""
    launch = host_timer(call)

    def sample() -> float:
        torch.cuda.synchronize()
        return launch()

    return sample


@dataclass(frozen=True)
class _Replay:
    """Of a captured graph, which reads tensors that nothing but the captured calls may hold."""

    graph: torch.cuda.CUDAGraph
    calls: Sequence[Callable[[], object]]

    def __call__(self) -> None:
        self.graph.replay()


def graph_of(calls: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All the calls captured into one CUDA graph; returns its replay.

    A call that waits for the GPU cannot be captured, and is refused before it spoils the capture.

    Each call should have inputs of its own, more of them than the L2 cache holds, or it would
    answer for the memory. Outputs live until all calls are captured, for the same reason.
    """
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for call in calls:
                call()
        mode = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            calls[0]()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        kept = [call() for call in calls]
    del kept
    return _Replay(graph, calls)
