"""``residual_layer_norm`` beside the sum and ``F.layer_norm`` of eager torch and torch.compile."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.case import Trial
from benchmarks.stitching import EPS, TOKENS, call
from benchmarks.subject import Baseline, Outputs, Phase, Shape, Subject, Tensors, Work
from snkernels.kernels import native
from snkernels.ops import residual_layer_norm

_KEEP = 0.5  # probability: of one sample and not of the next


def _shapes(images: int) -> list[Shape]:
    """Widths of DeiT3 and, without torch.compile, of the smallest and the largest ViT in use.

    ``s``: how many samples have a scale of DropPath, as in the training of the paper; 0 for none.
    """
    widths = {"S": 384, "B": 768, "L": 1024, "Ti": 192, "H": 1280}
    M = images * TOKENS
    return [
        *(Shape(n, {"M": M, "N": N, "s": 0}, compiled=n in "SBL") for n, N in widths.items()),
        *(Shape(f"{n}, DropPath", {"M": M, "N": widths[n], "s": images}) for n in "SBL"),
        Shape("S, cached", {"M": M, "N": widths["S"], "s": 0}, cached=True),
        call(N=64, s=0),
    ]


def _make(shape: Shape) -> Tensors:
    vectors = ("layer_scale", "norm_weight", "norm_bias")
    rows = {name: torch.randn(shape["M"], shape["N"]) for name in ("h", "branch")}
    tensors = rows | {name: torch.randn(shape["N"]) for name in vectors}
    if samples := shape.sizes.get("s"):
        tensors |= {name: t.unflatten(0, (samples, -1)) for name, t in rows.items()}
        tensors["drop_path_scale"] = (torch.arange(samples) % 2) / _KEEP
    return tensors


def _eager(t: Tensors) -> Outputs:
    branch = t["layer_scale"] * t["branch"]
    if "drop_path_scale" in t:
        branch = branch * t["drop_path_scale"].view(-1, 1, 1)
    total = t["h"] + branch
    return total, F.layer_norm(total, total.shape[-1:], t["norm_weight"], t["norm_bias"], EPS)


def _addcmul(t: Tensors) -> Outputs:
    """One pass less than eager, where dropped paths allow it."""
    branch = t["branch"]
    if "drop_path_scale" in t:
        branch = branch * t["drop_path_scale"].view(-1, 1, 1)
    total = torch.addcmul(t["h"], branch, t["layer_scale"])
    return total, F.layer_norm(total, total.shape[-1:], t["norm_weight"], t["norm_bias"], EPS)


def _ours(t: Tensors) -> Callable[[], Outputs]:
    scales = t["layer_scale"], t.get("drop_path_scale")
    norm = t["norm_weight"], t["norm_bias"], EPS
    return lambda: residual_layer_norm(t["h"], t["branch"], *scales, *norm)


def _bare(t: Tensors) -> Callable[[], Outputs]:
    """Without dropped paths: all rows are one sample's."""
    h, norm = t["h"], (t["norm_weight"], t["norm_bias"], EPS)
    outputs = native.norm_outputs(h, h.shape[1])
    arguments = (h, t["branch"], t["layer_scale"], None, len(h), *norm, *outputs)
    residual_layer_norm_forward = native._C.residual_layer_norm_forward
    threads = torch.get_num_threads()

    def run() -> Outputs:
        residual_layer_norm_forward(*arguments, threads)
        return outputs[:2]

    return run


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
    baselines={"addcmul": Baseline(lambda t: lambda: _addcmul(t))},
    work=_work,
    frozen=("drop_path_scale",),
    bare=_bare,
)


def test_residual_layer_norm(trial: Trial, benchmark: BenchmarkFixture) -> None:
    trial.run(benchmark)
