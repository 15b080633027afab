"""What a benchmark file says of its op: shapes, arguments, baselines, and the work it must do."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from torch import Tensor

Phase = Literal["inference", "forward", "forward+backward"]
PHASES: tuple[Phase, ...] = ("inference", "forward", "forward+backward")

Tensors = dict[str, Tensor]
Outputs = tuple[Tensor, ...]
Bind = Callable[[Tensors], Callable[[], Outputs]]


@dataclass(frozen=True)
class Shape:
    """A point of the paper's model.

    ``compiled`` says whether torch.compile is timed there: it compiles for 4 to 50 seconds per
    phase, so only the shapes that a claim rests on have it. ``calls``: how many calls in a row a
    sample of the host's clock is the mean of. ``cached``: every call has the same arguments, so
    that caches answer.
    """

    label: str
    sizes: dict[str, int]
    compiled: bool = False
    calls: int = 1
    cached: bool = False

    def __getitem__(self, size: str) -> int:
        return self.sizes[size]

    def __str__(self) -> str:
        sizes = "-".join(f"{name}{value}" for name, value in self.sizes.items())
        return f"{self.label.replace('→', '2')}-{sizes}"


@dataclass(frozen=True)
class Work:
    """The least that any implementation must do: floating-point operations and bytes moved."""

    flops: float
    bytes: float


@dataclass(frozen=True)
class Baseline:
    """Another way to write the op. ``lacks``: the arguments to which it gives no gradient.

    One that is not ``compared`` has other results: a yardstick, not a way to write the op.
    """

    bind: Bind
    lacks: tuple[str, ...] = ()
    compared: bool = True


@dataclass(frozen=True)
class Subject:
    """An op and all that it is timed against.

    An argument that comes once per group is named ``weight.0``, ``weight.1`` and so on.

    Attributes:
        op: name of the library op.
        shapes: the shapes for a batch of that many images.
        make: random fp32 arguments by name, as in a trained model (no lora_B of zeros).
        eager: the plain formula: first baseline, source of torch.compile's, and in fp64 the truth.
        ours: binds arguments to the op as training calls it.
        layer: binds arguments to the layer as inference calls it.
        baselines: the others by name.
        work: of a shape in a phase, for an element size in bytes.
        frozen: arguments that training does not change.
        bare: binds arguments to the compiled function for CPUs alone, with nothing of torch or
            this library around it, and outputs that stand ready; for shapes of many ``calls``.
    """

    op: str
    shapes: Callable[[int], Sequence[Shape]]
    make: Callable[[Shape], Tensors]
    eager: Callable[[Tensors], Outputs]
    ours: Bind
    layer: Bind
    baselines: dict[str, Baseline]
    work: Callable[[Shape, Phase, int], Work]
    frozen: tuple[str, ...] = ()
    bare: Bind | None = None


def argument(name: str) -> str:
    """The argument that a tensor belongs to: ``weight`` of ``weight.3``."""
    return name.partition(".")[0]


def subjects() -> dict[str, Subject]:
    """The subject of every bench_*.py in this folder, by op."""
    modules = sorted(path.stem for path in Path(__file__).parent.glob("bench_*.py"))
    found = [importlib.import_module(f"benchmarks.{name}").SUBJECT for name in modules]
    return {subject.op: subject for subject in found}
