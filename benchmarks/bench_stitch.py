"""``stitch`` beside eager torch, addmm, a merged linear layer and torch.compile."""

from collections.abc import Callable

from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import stitching
from benchmarks.case import Trial
from benchmarks.subject import Outputs, Phase, Shape, Subject, Tensors, Work
from snkernels.ops import stitch


def _finish(t: Tensors, y: Tensor) -> Outputs:
    return (y,)


def _ours(t: Tensors) -> Callable[[], Outputs]:
    scaling = stitching.scaling(t)
    arguments = (t["x"], t["weight"], t["bias"], t.get("lora_A"), t.get("lora_B"), scaling)
    return lambda: (stitch(*arguments),)


def _layer(t: Tensors) -> Callable[[], Outputs]:
    layer = stitching.layer(t)
    return lambda: (layer(t["x"]),)


def _work(shape: Shape, phase: Phase, itemsize: int) -> Work:
    return stitching.work(shape, phase, itemsize, outputs=1)


SUBJECT = Subject(
    op="stitch",
    shapes=stitching.shapes,
    make=stitching.make,
    eager=lambda t: (stitching.eager(t),),
    ours=_ours,
    layer=_layer,
    baselines=stitching.baselines(_finish),
    work=_work,
    frozen=("weight",),
    bare=lambda t: stitching.bare(t["x"], [0, len(t["x"])], [t], normalize=False),
)


def test_stitch(trial: Trial, benchmark: BenchmarkFixture) -> None:
    trial.run(benchmark)
