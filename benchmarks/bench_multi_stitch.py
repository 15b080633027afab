"""``multi_stitch_layer_norm`` beside a loop over the groups, each projected in the usual ways.

And beside one stitch for all rows, which computes something else: how near a grouped GEMM comes to
a homogeneous one.
"""

import itertools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor

from benchmarks import stitching
from benchmarks.case import Trial
from benchmarks.subject import Outputs, Phase, Shape, Subject, Tensors, Work
from snkernels.ops import StitchGroup, multi_stitch_layer_norm

Projection = Callable[[Tensors], Tensor]


def _shapes(images: int) -> list[Shape]:
    rows = images * stitching.TOKENS
    sizes = {"M": rows, "K": 384, "N": 1024, "r": 64}
    shapes = [Shape("S→L", {**sizes, "groups": groups}) for groups in (1, 4, 8, 12, 16, 24)]
    return [*shapes, stitching.call(K=8, N=8, r=4, groups=1)]


def _sizes(rows: int, groups: int) -> list[int]:
    """Group sizes in the proportion 1 : 2 : … : groups."""
    total = groups * (groups + 1) // 2
    ends = [rows * i * (i + 1) // 2 // total for i in range(groups + 1)]
    return [stop - start for start, stop in itertools.pairwise(ends)]


def _make(shape: Shape) -> Tensors:
    rows, groups = shape["M"], shape["groups"]
    tensors = {"x": torch.randn(rows, shape["K"])}
    one = Shape("", {name: shape[name] for name in "MKNr"} | {"M": 0})
    for i in range(groups):
        own = stitching.make(one) | {name: torch.randn(shape["N"]) for name in stitching.NAMES[4:]}
        tensors |= {f"{name}.{i}": value for name, value in own.items() if name in stitching.NAMES}
    return tensors | {"offsets": torch.tensor([0, *itertools.accumulate(_sizes(rows, groups))])}


def _groups(t: Tensors) -> list[Tensors]:
    names = [name for name in stitching.NAMES if f"{name}.0" in t]
    return [{n: t[f"{n}.{i}"] for n in names} for i in range(len(t["offsets"]) - 1)]


def _loop(t: Tensors, projections: list[Projection]) -> Outputs:
    # Not from the offsets: reading them on a GPU would wait for it.
    rows = t["x"].split(_sizes(len(t["x"]), len(projections)))
    parts = []
    for x, own, project in zip(rows, _groups(t), projections, strict=True):
        y = project(own | {"x": x})
        norm = (own["norm_weight"], own["norm_bias"], stitching.EPS)
        parts.append((y, F.layer_norm(y, y.shape[-1:], *norm)))
    y, normed = zip(*parts, strict=True)
    return torch.cat(y), torch.cat(normed)


def _eager(t: Tensors) -> Outputs:
    return _loop(t, [stitching.eager] * len(_groups(t)))


def _merged(t: Tensors) -> Callable[[], Outputs]:
    x, groups = t["x"], _groups(t)
    weights = [stitching.merged_weight(own).detach() for own in groups]
    ends = list(itertools.accumulate(_sizes(len(x), len(groups))))

    def linear(weight: Tensor) -> Projection:
        return lambda t: F.linear(t["x"], weight, t["bias"])

    projections = [linear(weight) for weight in weights]

    def run() -> Outputs:
        if torch.is_grad_enabled():
            return _loop(t, projections)
        # Without gradients only LN(y), which torch writes nowhere but to a new tensor, is copied.
        y = x.new_empty(len(x), len(weights[0]))
        normed = torch.empty_like(y)
        for start, stop, own, weight in zip([0, *ends], ends, groups, weights, strict=False):
            rows = torch.addmm(own["bias"], x[start:stop], weight.t(), out=y[start:stop])
            norm = (own["norm_weight"], own["norm_bias"], stitching.EPS)
            normed[start:stop] = F.layer_norm(rows, rows.shape[-1:], *norm)
        return y, normed

    return run


def _one_stitch(t: Tensors) -> Callable[[], Outputs]:
    """All rows by the first group's stitch: what a single GEMM of this size takes."""
    own = _groups(t)[0]
    weight = stitching.merged_weight(own).detach()
    norm = (own["norm_weight"], own["norm_bias"], stitching.EPS)

    def run() -> Outputs:
        y = F.linear(t["x"], weight, own["bias"])
        return y, F.layer_norm(y, y.shape[-1:], *norm)

    return run


def _ours(t: Tensors) -> Callable[[], Outputs]:
    scaling = stitching.scaling(_groups(t)[0])
    groups = [StitchGroup(**own, scaling=scaling) for own in _groups(t)]
    return lambda: multi_stitch_layer_norm(t["x"], t["offsets"], groups, stitching.EPS)


def _work(shape: Shape, phase: Phase, itemsize: int) -> Work:
    """That of one stitch over all rows, and the further groups' weights."""
    one = stitching.work(shape, phase, itemsize, outputs=2)
    passes = 2 if phase == "forward+backward" else 1
    weights = (shape["groups"] - 1) * shape["N"] * shape["K"] * passes
    return Work(one.flops, one.bytes + weights * itemsize)


SUBJECT = Subject(
    op="multi_stitch",
    shapes=_shapes,
    make=_make,
    eager=_eager,
    ours=_ours,
    layer=_ours,
    baselines={
        "addmm": stitching.Baseline(
            lambda t: lambda: _loop(t, [stitching.addmm] * len(_groups(t)))
        ),
        "merged": stitching.Baseline(_merged, lacks=("lora_A", "lora_B")),
        "one stitch": stitching.Baseline(_one_stitch, compared=False),
    },
    work=_work,
    frozen=("weight",),
    bare=lambda t: stitching.bare(t["x"], t["offsets"].tolist(), _groups(t), normalize=True),
)


def test_multi_stitch(trial: Trial, benchmark: BenchmarkFixture) -> None:
    trial.run(benchmark)
