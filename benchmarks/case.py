"""One op at one shape, dtype and phase: its entries bound to the same arguments, checked, timed.

An entry is timed only after its outputs and gradients were compared with fp64, so no speed is ever
printed for a kernel that is wrong.
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import machine
from benchmarks.subject import (
    PHASES,
    Baseline,
    Bind,
    Outputs,
    Phase,
    Shape,
    Subject,
    Tensors,
    argument,
)
from benchmarks.timing import Candidate, gpu_timer, graph_of, host_timer, launch_timer
from python_tests.judge import assert_as_exact_as_torch, error
from snkernels.backends import BACKENDS, choose, obstacle, use_backend
from snkernels.ops.library import OFFERED

GPU_BACKENDS = ("triton", "cuda")
# Of tiny arguments: to fill a cache with them would take thousands, and they lie in it in any case.
_MOST_COPIES = 256
_ROUNDS = 30  # of pytest-benchmark, each behind a look at other memory
EAGER = "eager"
BARE = "bare kernel"  # what is left of a call without torch and this library around it


@dataclass(frozen=True)
class Entry:
    """One of the ways to compute a case: a baseline, or the op on a backend."""

    name: str
    bind: Bind
    backend: str | None = None
    lacks: tuple[str, ...] = ()
    compared: bool = True

    @property
    def ours(self) -> bool:
        """Whether it is a kernel of this library, and not what it is compared with."""
        return self.backend not in (None, "torch")


@dataclass(frozen=True, eq=False)
class Case:
    """What is timed side by side."""

    subject: Subject
    shape: Shape
    dtype: torch.dtype
    device: torch.device
    phase: Phase

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.subject.op}-{self.shape}-{dtype}-{self.phase}"

    def entries(self) -> list[Entry]:
        """Eager first, then the other baselines, then the op on every backend that runs here."""
        s = self.subject
        baselines = {EAGER: Baseline(lambda t: lambda: s.eager(t)), **s.baselines}
        if self.shape.compiled:
            baselines["torch.compile"] = Baseline(_compiled(s))
        # In inference a layer runs its merged weight, which the bare kernel is not told of.
        forward, runs = self.phase == "forward", self._obstacle("cpu") is None
        if s.bare and self.shape.calls > 1 and forward and runs:
            baselines[BARE] = Baseline(s.bare)
        entries = [Entry(n, b.bind, None, b.lacks, b.compared) for n, b in baselines.items()]
        bind = s.layer if self.phase == "inference" else s.ours
        for backend in BACKENDS:
            # On the CPU, Triton means its interpreter, whose speed says nothing.
            interpreted = backend == "triton" and self.device.type == "cpu"
            if backend in OFFERED[s.op] and self._obstacle(backend) is None and not interpreted:
                entries.append(Entry(f"{backend} backend", bind, backend))
        return entries

    def _obstacle(self, backend: str) -> str | None:
        return obstacle(backend, self.device.type, self.dtype)


def cases(subject: Subject, device: torch.device) -> list[Case]:
    """All cases of a subject: 8 images in fp32 on a CPU, 64 in bf16 on a GPU.

    None on a GPU for an op that has no kernel for it.
    """
    gpu = device.type == "cuda"
    if gpu and not set(GPU_BACKENDS).intersection(OFFERED[subject.op]):
        return []
    images, dtype = (64, torch.bfloat16) if gpu else (8, torch.float32)
    shapes = subject.shapes(images)
    return [Case(subject, shape, dtype, device, phase) for shape in shapes for phase in PHASES]


class Bench:
    """The arguments of a case, and the results that every entry must have."""

    def __init__(self, case: Case) -> None:
        torch.compiler.reset()  # or many shapes of one function would reach dynamo's limit
        self.case = case
        with torch.random.fork_rng():
            torch.manual_seed(0)
            made = {name: t.to(case.device) for name, t in case.subject.make(case.shape).items()}
            leaves = self._leaves(made, case.dtype)
            with torch.no_grad():
                outputs = case.subject.eager(leaves)
            self._cotangents = tuple(torch.randn_like(output) for output in outputs)
        self.copies = self._copies(leaves)
        self.arguments = [leaves]
        self.arguments += [self._leaves(leaves, case.dtype) for _ in range(self.copies)]
        self._turn = itertools.cycle(range(len(self.arguments)))
        self._evict = self._reader() if self.copies and case.device.type == "cpu" else None
        eager = case.entries()[0]
        self._exact = self._results(eager, self._leaves(leaves, torch.float64))
        self._eager = self._results(eager, leaves)

    def candidate(self, entry: Entry) -> Candidate:
        """The entry, ready to be timed."""
        scope = functools.partial(self.scope, entry)
        with scope():
            calls = self.calls(entry)
            if self.case.device.type == "cuda":
                sample = gpu_timer(graph_of(calls), len(calls))
            else:
                call, count = self.in_turn(calls), self.case.shape.calls
                sample = host_timer(call, calls=count, before=self.before(call))
        return Candidate(entry.name, sample, scope)

    def launch(self, entry: Entry) -> Candidate:
        """The entry without a graph, to time what the CPU needs to launch it on a GPU."""
        scope = functools.partial(self.scope, entry)
        with scope():
            call = self._call(entry, self.arguments[0])
        return Candidate(entry.name, launch_timer(call), scope)

    def check(self, entry: Entry) -> str | None:
        """Compares all results with fp64, by the rule of the tests.

        A baseline that breaks the rule is timed all the same if it is right to half its digits:
        inductor sums gradients of vectors row after row on a CPU, several times less exact than
        torch, and a rival left out would flatter us.

        Returns:
            In what a baseline broke the rule.

        Raises:
            AssertionError: wrong results; for a kernel of this library, results less exact than
                the tests ask.
        """
        note = None
        actual = self._results(entry, self.arguments[0])
        if not entry.compared:
            return note
        for name, exact in self._exact.items():
            if name not in actual:
                assert argument(name.removeprefix("grad of ")) in entry.lacks, f"no {name}"
                continue
            try:
                assert_as_exact_as_torch(name, actual[name], self._eager[name], exact)
            except AssertionError as broken:
                typical = exact.square().mean().sqrt().item()
                digits = torch.finfo(actual[name].dtype).eps ** 0.5
                if entry.ours or error(actual[name], exact) > digits * typical:
                    raise
                note = str(broken).splitlines()[0]
        return note

    def calls(self, entry: Entry) -> list[Callable[[], Outputs]]:
        """Calls of the entry, one per copy of the arguments."""
        first, *others = self.arguments
        copies = [self._call(entry, other, copy=True) for other in others]
        return [self._call(entry, first), *copies]

    def in_turn(self, calls: list[Callable[[], Outputs]]) -> Callable[[], Outputs]:
        """A call that takes the copy of the arguments that no entry has used for longest."""
        return lambda: calls[next(self._turn)]()

    @contextlib.contextmanager
    def scope(self, entry: Entry) -> Iterator[None]:
        """The gradient mode of the phase and the backend of the entry, chosen ahead of the call."""
        case = self.case
        grads = case.phase != "inference"
        with use_backend(entry.backend), torch.set_grad_enabled(grads):
            for op, offered in OFFERED.items():
                if entry.backend in offered:
                    choose(op, offered, case.device.type, case.dtype)
            yield

    def before(self, call: Callable[[], Outputs]) -> Callable[[], None] | None:
        """What a timed call comes after, untimed; None where nothing does, or caches may answer.

        Itself, as in the block before in a model, and then other memory. Else what the CPU has
        learnt of code would be what other entries left, of which half run eager's.
        """
        evict = self._evict
        if evict is None:
            return None

        def run() -> None:
            call()
            evict()

        return run

    def _leaves(self, tensors: Tensors, dtype: torch.dtype) -> Tensors:
        """Copies to compute with; offsets and other integers stay as they are."""
        training, frozen = self.case.phase != "inference", self.case.subject.frozen
        return {
            name: tensor.detach()
            .to(dtype, copy=True)
            .requires_grad_(training and argument(name) not in frozen)
            if tensor.is_floating_point()
            else tensor
            for name, tensor in tensors.items()
        }

    def _copies(self, leaves: Tensors) -> int:
        """Further copies of the arguments, so that caches cannot hold them all.

        In a model each call has tensors of its own, and what other layers read and write comes
        between. None where a shape says that caches may answer.
        """
        if self.case.shape.cached:
            return 0
        read = [*leaves.values()]
        if self.case.phase == "forward+backward":
            read += self._cotangents
        size = sum(tensor.nbytes for tensor in read)
        return min(math.ceil(2 * machine.cache_bytes(self.case.device) / size), _MOST_COPIES)

    def _reader(self) -> Callable[[], object]:
        """Reads twice what the last cache holds, so that nothing else is left in it.

        Or an entry with many temporaries would find those of its last call there, which in a model
        the layers between push out, and leave to the next entry to wait until they are written.
        """
        elements = 2 * machine.cache_bytes(self.case.device) // torch.float32.itemsize
        return torch.ones(elements).sum

    def _call(self, entry: Entry, arguments: Tensors, copy: bool = False) -> Callable[[], Outputs]:
        forward = entry.bind(arguments)
        if self.case.phase != "forward+backward":
            return forward
        leaves = [leaf for leaf in arguments.values() if leaf.requires_grad]
        cotangents = [c.to(leaves[0].dtype, copy=copy) for c in self._cotangents]

        def step() -> Outputs:
            outputs = forward()
            return *outputs, *torch.autograd.grad(outputs, leaves, cotangents, allow_unused=True)

        return step

    def _results(self, entry: Entry, arguments: Tensors) -> Tensors:
        """Outputs and gradients by name."""
        with self.scope(entry):
            values = self._call(entry, arguments)()
        names = [f"output {i}" for i in range(len(self._cotangents))]
        names += [f"grad of {name}" for name, leaf in arguments.items() if leaf.requires_grad]
        # Of a forward pass there are no gradients, and the names end with the outputs.
        return {
            name: value.detach()
            for name, value in zip(names, values, strict=False)
            if value is not None
        }


def _compiled(subject: Subject) -> Bind:
    compiled = torch.compile(subject.eager, fullgraph=True, dynamic=False)
    return lambda t: lambda: compiled(t)


@dataclass(frozen=True, repr=False)
class Trial:
    """One entry of one case, for pytest-benchmark, which keeps its repr in its files."""

    case: Case
    entry: Entry

    def __repr__(self) -> str:
        return f"{self.case}-{self.entry.name}"

    def run(self, benchmark: BenchmarkFixture) -> None:
        """Checks the entry, then times it in the group of its case.

        On a GPU a round is a replay of ``calls`` captured calls, and the wait for its end.
        """
        bench = _bench(self.case)
        benchmark.group = str(self.case)
        benchmark.extra_info["note"] = bench.check(self.entry)
        with bench.scope(self.entry):
            calls = bench.calls(self.entry)
            call = bench.in_turn(calls)
            before = bench.before(call)
            if self.case.device.type == "cuda":
                replay = graph_of(calls)

                def replay_and_wait() -> None:
                    replay()
                    torch.cuda.synchronize()

                benchmark.extra_info["calls"] = len(calls)
                benchmark(replay_and_wait)
            elif before is None:
                benchmark(call)
            else:
                benchmark.pedantic(call, setup=before, rounds=_ROUNDS)


_bench = functools.lru_cache(maxsize=1)(Bench)
