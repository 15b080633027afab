"""``stitch_layer_norm`` beside a projection, in each of the usual ways, and ``F.layer_norm``."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn

from benchmarks import stitching
from benchmarks.case import Trial
from benchmarks.subject import Outputs, Phase, Shape, Subject, Tensors, Work
from snkernels.ops import stitch_layer_norm


def _make(shape: Shape) -> Tensors:
    norm = {name: torch.randn(shape["N"]) for name in ("norm_weight", "norm_bias")}
    return stitching.make(shape) | norm


def _finish(t: Tensors, y: Tensor) -> Outputs:
    return y, F.layer_norm(y, y.shape[-1:], t["norm_weight"], t["norm_bias"], stitching.EPS)


def _ours(t: Tensors) -> Callable[[], Outputs]:
    scaling = stitching.scaling(t)
    arguments = (t["x"], t["weight"], t["bias"], t.get("lora_A"), t.get("lora_B"), scaling)
    norm = (t["norm_weight"], t["norm_bias"], stitching.EPS)
    return lambda: stitch_layer_norm(*arguments, *norm)


def _layer(t: Tensors) -> Callable[[], Outputs]:
    x, layer = t["x"], stitching.layer(t)
    norm = nn.LayerNorm(layer.out_features, stitching.EPS, device=x.device, dtype=x.dtype)
    norm.load_state_dict({"weight": t["norm_weight"], "bias": t["norm_bias"]})
    return lambda: layer.forward_norm(x, norm)


def _work(shape: Shape, phase: Phase, itemsize: int) -> Work:
    return stitching.work(shape, phase, itemsize, outputs=2)


SUBJECT = Subject(
    op="stitch_layer_norm",
    shapes=stitching.shapes,
    make=_make,
    eager=lambda t: _finish(t, stitching.eager(t)),
    ours=_ours,
    layer=_layer,
    baselines=stitching.baselines(_finish),
    work=_work,
    frozen=("weight",),
    bare=lambda t: stitching.bare(t["x"], [0, len(t["x"])], [t], normalize=True),
)


def test_stitch_layer_norm(trial: Trial, benchmark: BenchmarkFixture) -> None:
    trial.run(benchmark)
