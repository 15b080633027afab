"""``residual_layer_norm`` beside the sum and ``F.layer_norm`` of eager torch and torch.compile."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.case import Trial
from benchmarks.stitching import EPS, TOKENS, call
from benchmarks.subject import Outputs, Phase, Shape, Subject, Tensors, Work
from snkernels.ops import residual_layer_norm


def _shapes(images: int) -> list[Shape]:
    """Widths of DeiT3 and, without torch.compile, of the smallest and the largest ViT in use."""
    widths = {"S": 384, "B": 768, "L": 1024, "Ti": 192, "H": 1280}
    shapes = [
        Shape(name, {"M": images * TOKENS, "N": N}, compiled=name in "SBL")
        for name, N in widths.items()
    ]
    return [*shapes, call(N=64)]


def _make(shape: Shape) -> Tensors:
    vectors = ("layer_scale", "norm_weight", "norm_bias")
    rows = {name: torch.randn(shape["M"], shape["N"]) for name in ("h", "branch")}
    return rows | {name: torch.randn(shape["N"]) for name in vectors}


def _eager(t: Tensors) -> Outputs:
    total = t["h"] + t["layer_scale"] * t["branch"]
    return total, F.layer_norm(total, total.shape[-1:], t["norm_weight"], t["norm_bias"], EPS)


def _ours(t: Tensors) -> Callable[[], Outputs]:
    norm = (t["norm_weight"], t["norm_bias"], EPS)
    return lambda: residual_layer_norm(t["h"], t["branch"], t["layer_scale"], None, *norm)


def _work(shape: Shape, phase: Phase, itemsize: int) -> Work:
    """Forward: two matrices in, two out. Backward: both gradients, sum and branch in, two out."""
    matrices = 10 if phase == "forward+backward" else 4
    return Work(0, matrices * shape["M"] * shape["N"] * itemsize)


SUBJECT = Subject(
    op="residual_layer_norm",
    shapes=_shapes,
    make=_make,
    eager=_eager,
    ours=_ours,
    layer=_ours,
    baselines={},
    work=_work,
)


def test_residual_layer_norm(trial: Trial, benchmark: BenchmarkFixture) -> None:
    trial.run(benchmark)
