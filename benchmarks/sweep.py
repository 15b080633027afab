"""Checks the kernels' heuristics on a GPU: times each choice beside the configurations around it.

    python -m benchmarks.sweep --out sweep.json

``snkernels/kernels/triton/configs.py`` chooses by rule and never tunes at run time, so what it
chooses has to be looked at here. For each heuristic and class of shapes this times the choice and
all that differ from it in a value or two, interleaved, and says where the choice is more than 3 %
slower than the best. It ends with status 1 if there is such a place.
"""

import argparse
import datetime
import itertools
import json
import math
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import machine
from benchmarks.stitching import TOKENS
from benchmarks.timing import Candidate, Samples, Spread, gpu_timer, graph_of, interleave, speedup
from python_tests.judge import assert_as_exact_as_torch
from snkernels import reference
from snkernels.kernels.triton import configs
from snkernels.kernels.triton.configs import Config
from snkernels.kernels.triton.groups import WEIGHT, Groups
from snkernels.kernels.triton.merge import merged_of_groups
from snkernels.kernels.triton.multi_stitch import project
from snkernels.kernels.triton.outer import outer
from snkernels.kernels.triton.residual_layer_norm import (
    residual_layer_norm_backward,
    residual_layer_norm_forward,
)
from snkernels.kernels.triton.sums import column_sums, sum_partials
from snkernels.progress import progress_bar
from snkernels.text import aligned

TOLERATED = 0.03
GROUPS = 8  # of equal rows, where kernels go by groups

Tensors = dict[str, Tensor]
Outputs = Sequence[Tensor]

# What each heuristic could have chosen instead, value by value.
SPACE: dict[str, dict[str, tuple[int, ...]]] = {
    "project": {
        "BLOCK_M": (64, 128),
        "BLOCK_N": (64, 128, 256),
        "BLOCK_K": (32, 64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "merge": {
        "BLOCK_N": (32, 64, 128),
        "BLOCK_K": (32, 64, 128),
        "BLOCK_R": (16, 32, 64, 128),
        "num_warps": (2, 4, 8),
        "num_stages": (1, 2, 3),
    },
    "outer": {
        "BLOCK_M": (32, 64, 128),
        "BLOCK_P": (64, 128),
        "BLOCK_Q": (64, 128),
        "num_warps": (4, 8),
        "num_stages": (2, 3, 4),
    },
    "normalize_rows": {"BLOCK_M": (1, 2, 4, 8, 16), "num_warps": (1, 2, 4, 8)},
    "normalize_rows_backward": {
        "BLOCK_M": (1, 2, 4, 8),
        "num_warps": (1, 2, 4, 8),
        "CTAS_PER_SM": (1, 2, 3, 4, 8),
        "STAGES": (1, 3),
    },
    "sum_rows": {"BLOCK_M": (16, 32, 64, 128), "BLOCK_N": (32, 64, 128), "num_warps": (4, 8)},
    "sum_partials": {"BLOCK_M": (32, 64, 128), "BLOCK_N": (16, 32, 64), "num_warps": (4, 8)},
}


@dataclass(frozen=True)
class Case:
    """A heuristic at one class of shapes.

    Attributes:
        heuristic: its name in ``configs``.
        shape: for people.
        chosen: what the heuristic chooses there.
        make: random arguments on torch's default device.
        call: runs the kernel.
        exact: the same in torch, also of fp64 arguments.
    """

    heuristic: str
    shape: str
    chosen: Config
    make: Callable[[], Tensors]
    call: Callable[[Tensors], Outputs]
    exact: Callable[[Tensors], Outputs]

    def candidates(self, changes: int) -> list[Config]:
        """The choice, then all of SPACE that differ from it in at most so many values."""
        space = SPACE[self.heuristic]
        found = [self.chosen]
        for count in range(1, changes + 1):
            for names in itertools.combinations(space, count):
                others = ([v for v in space[n] if v != self.chosen.get(n)] for n in names)
                for values in itertools.product(*others):
                    found.append({**self.chosen, **dict(zip(names, values, strict=True))})
        return found


@dataclass(frozen=True)
class Timed:
    """A configuration: seconds, how many times faster than the choice, or why it did not run."""

    config: Config
    seconds: float | None = None
    speedup: float | None = None
    refused: str | None = None


@dataclass(frozen=True)
class Verdict:
    """What a case came to; ``timed`` begins with the choice, the others fastest first."""

    heuristic: str
    shape: str
    timed: list[Timed]

    @property
    def best(self) -> Timed:
        """The fastest of all, which may be the choice."""
        ran = [t for t in self.timed if t.speedup is not None]
        return max(ran, key=lambda t: t.speedup or 0.0)

    @property
    def loss(self) -> float:
        """How much slower the choice is than the best: 0.05 for 5 %."""
        return max(0.0, (self.best.speedup or 1.0) - 1.0)

    @property
    def holds(self) -> bool:
        """Whether the choice may stay."""
        return self.loss <= TOLERATED


Measure = Callable[[Case, Sequence[Config]], tuple[Samples, dict[str, str]]]


def judge(case: Case, changes: int, measure: Measure) -> Verdict:
    """Times the choice and its neighbours.

    Args:
        case: the case.
        changes: in how many values a neighbour may differ.
        measure: gives seconds round by round for each configuration that ran, and for the others
            why they did not, by their place among the candidates.

    Raises:
        RuntimeError: the choice itself does not run.
    """
    candidates = case.candidates(changes)
    samples, refused = measure(case, candidates)
    if "0" in refused:
        raise RuntimeError(f"{case.heuristic}, {case.shape}: the choice fails: {refused['0']}")
    timed = []
    for i, config in enumerate(candidates):
        name = str(i)
        if name in refused:
            timed.append(Timed(config, refused=refused[name]))
        else:
            gain = speedup(samples, name, "0").median
            timed.append(Timed(config, Spread.of(samples[name]).median, gain))
    others = sorted(timed[1:], key=lambda t: -(t.speedup or 0.0))
    return Verdict(case.heuristic, case.shape, [timed[0], *others])


def check(case: Case, arguments: Tensors) -> None:
    """Raises AssertionError where the kernel's error is above twice torch's in the same dtype."""
    same = case.exact(arguments)
    exact = case.exact({name: tensor.double() for name, tensor in arguments.items()})
    for i, actual in enumerate(case.call(arguments)):
        assert_as_exact_as_torch(f"output {i}", actual, same[i], exact[i])


class OnGpu:
    """Measures by graph replay, with as many copies of the arguments as the L2 cannot hold.

    A configuration that is less exact than twice torch's error is refused, like one that the GPU
    does not take.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, case: Case, candidates: Sequence[Config]) -> tuple[Samples, dict[str, str]]:
        """See :func:`judge`."""
        with torch.random.fork_rng(), torch.device("cuda"):
            torch.manual_seed(0)
            first = case.make()
        size = sum(t.numel() * t.itemsize for t in (*first.values(), *case.exact(first)))
        copies = math.ceil(2 * machine.cache_bytes(torch.device("cuda")) / size)
        arguments = [first] + [{n: t.clone() for n, t in first.items()} for _ in range(copies)]
        ready, refused = [], {}
        for i, config in enumerate(candidates):
            try:
                with configs.override(case.heuristic, **config):
                    check(case, first)
                    calls = [lambda t=t: case.call(t) for t in arguments]  # type: ignore[misc]
                    replay = graph_of(calls)
            except Exception as error:  # whatever it is, the others can still be timed
                refused[str(i)] = f"{type(error).__name__}: {error}".splitlines()[0]
            else:
                ready.append(Candidate(str(i), gpu_timer(replay, len(arguments))))
        samples = interleave(ready, seconds=self.seconds, least=7) if ready else {}
        return samples, refused


def cases(dtype: torch.dtype, images: int) -> Iterator[Case]:
    """Every heuristic at the paper's shapes, 197 tokens to an image."""
    rows = images * TOKENS // GROUPS * GROUPS
    for k, n in ((384, 1024), (1024, 384), (384, 768), (384, 64), (1024, 64), (1024, 16)):
        yield _project(dtype, rows, k, n)
    for r in (16, 64, 128):
        yield _merge(dtype, 384, 1024, r)
    for height, width in ((1024, 384), (384, 1024), (1024, 64), (384, 64)):
        yield _outer(dtype, rows, height, width)
    for n in (192, 384, 768, 1024, 1280):
        yield _normalize(dtype, rows, n)
        yield _normalize_backward(dtype, rows, n)
    for n in (384, 1024):
        yield _sum_rows(dtype, rows, n)
        yield _sum_partials(264, n)


def _all_in(dtype: torch.dtype, tensors: Tensors) -> Tensors:
    return {name: tensor.to(dtype) for name, tensor in tensors.items()}


def _groups(rows: Tensor, weights: Tensors, features: int) -> Groups:
    """Groups of equal rows; ``weights`` holds all their W, A and B, those that they have."""
    own = (weights.get(name, [None] * GROUPS) for name in ("w", "A", "B"))
    tensors = [p for w, a, b in zip(*own, strict=True) for p in (w, None, a, b, None, None)]
    offsets = [len(rows) // GROUPS * i for i in range(GROUPS + 1)]
    return Groups(rows, offsets, tensors, [0.25] * GROUPS, features)


def _by_group(rows: Tensor) -> Tensor:
    return rows.unflatten(0, (GROUPS, -1))


def _project(dtype: torch.dtype, rows: int, k: int, n: int) -> Case:
    def make() -> Tensors:
        return _all_in(dtype, {"x": torch.randn(rows, k), "w": torch.randn(GROUPS, n, k) * k**-0.5})

    def call(t: Tensors) -> Outputs:
        groups = _groups(t["x"], t, n)
        y = torch.empty(rows, n, dtype=t["x"].dtype, device=t["x"].device)
        return [project(groups, t["x"], y, groups.parameter(WEIGHT, transposed=True))]

    return Case(
        "project",
        f"M{rows} K{k} N{n}",
        configs.project(dtype, dtype, "ieee", n),
        make,
        call,
        lambda t: [(_by_group(t["x"]) @ t["w"].mT).flatten(0, 1)],
    )


def _merge(dtype: torch.dtype, k: int, n: int, r: int) -> Case:
    def make() -> Tensors:
        factors = {"A": torch.randn(GROUPS, r, k) * k**-0.5, "B": torch.randn(GROUPS, n, r)}
        return _all_in(dtype, {"w": torch.randn(GROUPS, n, k) * k**-0.5} | factors)

    def call(t: Tensors) -> Outputs:
        no_rows = t["w"].new_empty(0, k)
        merged = merged_of_groups(_groups(no_rows, t, n), no_rows)
        assert merged is not None
        return [merged.one.data]

    return Case(
        "merge",
        f"K{k} N{n} r{r}",
        configs.merge(dtype, "ieee", r),
        make,
        call,
        # What is compared is the first group's.
        lambda t: [t["w"][0] + 0.25 * (t["B"][0] @ t["A"][0])],
    )


def _outer(dtype: torch.dtype, rows: int, height: int, width: int) -> Case:
    def make() -> Tensors:
        tensors = {"left": torch.randn(rows, height), "right": torch.randn(rows, width)}
        return _all_in(dtype, tensors)

    def call(t: Tensors) -> Outputs:
        left, right = t["left"], t["right"]
        return [outer(left, right, left.dtype, _groups(left, {}, height))]

    return Case(
        "outer",
        f"M{rows} P{height} Q{width}",
        configs.outer(dtype, "ieee", width),
        make,
        call,
        lambda t: [_by_group(t["left"]).mT @ _by_group(t["right"])],
    )


def _normalize(dtype: torch.dtype, rows: int, n: int) -> Case:
    def make() -> Tensors:
        vectors = {name: torch.randn(n) for name in ("layer_scale", "weight", "bias")}
        matrices = {name: torch.randn(rows, n) for name in ("h", "branch")}
        return _all_in(dtype, matrices | vectors)

    def call(t: Tensors) -> Outputs:
        h, branch, layer_scale, weight, bias = t.values()
        scales = layer_scale, None
        return residual_layer_norm_forward(h, branch, *scales, weight, bias, 1e-6, h.dtype)[:2]

    def exact(t: Tensors) -> Outputs:
        h, branch, layer_scale, weight, bias = t.values()
        total = reference.residual(h, branch, layer_scale, None)
        return [total, reference.layer_norm(total, weight, bias, 1e-6)[0]]

    chosen = configs.normalize_rows(dtype, dtype, n)
    return Case("normalize_rows", f"M{rows} N{n}", chosen, make, call, exact)


def _normalize_backward(dtype: torch.dtype, rows: int, n: int) -> Case:
    def make() -> Tensors:
        matrices = ("grad_sum", "grad_normed", "branch", "total")
        tensors = {name: torch.randn(rows, n) for name in matrices}
        tensors |= {name: torch.randn(n) for name in ("layer_scale", "weight", "bias")}
        tensors = _all_in(dtype, tensors)
        _, mean, rstd = reference.layer_norm(tensors["total"], None, None, 1e-6)
        return tensors | {"mean": mean, "rstd": rstd}

    def call(t: Tensors) -> Outputs:
        grads, branch = (t["grad_sum"], t["grad_normed"]), t["branch"]
        saved = t["total"], t["mean"], t["rstd"], t["weight"], t["bias"]
        return residual_layer_norm_backward(
            *grads, branch, branch, t["layer_scale"], None, *saved, [True] * 5
        )

    def exact(t: Tensors) -> Outputs:
        total = t["total"]
        grad, *norm_grads = reference.layer_norm_backward(
            t["grad_normed"], total, t["mean"], t["rstd"], t["weight"]
        )
        grad = grad + t["grad_sum"]
        branch_grads = reference.residual_backward(grad, t["branch"], t["layer_scale"], None)
        return [g.to(total.dtype) for g in (grad, *branch_grads, *norm_grads)]

    chosen = configs.normalize_rows_backward(dtype, dtype, n)
    return Case("normalize_rows_backward", f"M{rows} N{n}", chosen, make, call, exact)


def _sum_rows(dtype: torch.dtype, rows: int, n: int) -> Case:
    return Case(
        "sum_rows",
        f"M{rows} N{n}",
        configs.sum_rows(),
        lambda: _all_in(dtype, {"matrix": torch.randn(rows, n)}),
        lambda t: [column_sums(t["matrix"], t["matrix"].dtype, _groups(t["matrix"], {}, n))],
        lambda t: [_by_group(t["matrix"]).sum(1)],
    )


def _sum_partials(chunks: int, n: int) -> Case:
    return Case(
        "sum_partials",
        f"{chunks} chunks of 3 N{n}",
        configs.sum_partials(),
        lambda: {"partial": torch.randn(chunks, 3, n)},
        lambda t: sum_partials(t["partial"], [torch.float32] * 3),
        lambda t: t["partial"].sum(0).unbind(),
    )


def table(verdicts: Sequence[Verdict]) -> str:
    """One line for each case: the choice, its time, and the best where that is another."""
    rows = [["heuristic", "shape", "choice", "µs", "best", "slower by", ""]]
    for v in verdicts:
        choice, best = v.timed[0], v.best
        assert choice.seconds is not None
        changed = {k: n for k, n in best.config.items() if choice.config.get(k) != n}
        rows.append(
            [
                v.heuristic,
                v.shape,
                _text(choice.config),
                f"{choice.seconds * 1e6:.1f}",
                _text(changed) or "the choice",
                f"{v.loss:.1%}",
                "" if v.holds else "CHANGE IT",
            ]
        )
    return aligned(rows, right=(3, 5))


def _text(config: Config) -> str:
    return " ".join(f"{name.removeprefix('BLOCK_')}={value}" for name, value in config.items())


def main(arguments: Sequence[str] | None = None, measure: Measure | None = None) -> int:
    """Returns 1 where a choice is too slow; ``measure`` replaces the GPU in tests."""
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--heuristics", nargs="+", choices=SPACE, default=list(SPACE))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--images", type=int, default=64, help="of 197 tokens each")
    parser.add_argument("--changes", type=int, default=1, help="values that a candidate may change")
    parser.add_argument("--seconds", type=float, default=0.5, help="of timing per case")
    parser.add_argument("--out", type=Path, help="where to write all times, as JSON")
    options = parser.parse_args(arguments)
    if measure is None:
        if not torch.cuda.is_available():
            print("a sweep needs a GPU, and torch finds none here", file=sys.stderr)
            return 2
        measure = OnGpu(options.seconds)
    chosen = [
        case
        for case in cases(getattr(torch, options.dtype), options.images)
        if case.heuristic in options.heuristics
    ]
    verdicts = [judge(case, options.changes, measure) for case in progress_bar(chosen, "sweep")]
    print(table(verdicts))
    if options.out:
        options.out.write_text(json.dumps(_record(verdicts, arguments), indent=1) + "\n")
    return 0 if all(v.holds for v in verdicts) else 1


def _record(verdicts: Sequence[Verdict], arguments: Sequence[str]) -> dict[str, Any]:
    commit, dirty = machine.commit()
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", "-m", "benchmarks.sweep", *arguments]),
        "commit": commit,
        "dirty": dirty,
        "machine": machine.describe(),
        "versions": machine.versions(),
        "tolerated": TOLERATED,
        "cases": [asdict(v) | {"loss": v.loss, "holds": v.holds} for v in verdicts],
    }


if __name__ == "__main__":
    sys.exit(main())
