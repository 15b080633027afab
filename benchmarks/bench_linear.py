"""``linear`` beside ``F.linear``: the layers of a ViT's blocks, where most of its time goes.

F.linear of a matrix is one addmm already, so there is no other way to write it but torch.compile's.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks.case import Trial
from benchmarks.stitching import TOKENS
from benchmarks.subject import Outputs, Phase, Shape, Subject, Tensors, Work
from snkernels.ops import linear

_WIDTHS = {"S": 384, "B": 768, "L": 1024}
_LAYERS = {"qkv": (1, 3), "proj": (1, 1), "fc1": (1, 4), "fc2": (4, 1)}  # widths in and out


def _shapes(images: int) -> list[Shape]:
    """All layers of DeiT3-B, for a single image too, and one of S and of L each."""

    def shape(anchor: str, layer: str, compiled: bool = False) -> Shape:
        K, N = (_WIDTHS[anchor] * times for times in _LAYERS[layer])
        return Shape(f"{anchor}, {layer}", {"M": images * TOKENS, "K": K, "N": N}, compiled)

    of_B = [shape("B", layer) for layer in _LAYERS]
    return [
        *of_B,
        shape("S", "fc1", compiled=True),
        shape("L", "proj"),
        *(Shape(f"{s.label}, 1 image", s.sizes | {"M": TOKENS}) for s in of_B),
    ]


def _make(shape: Shape) -> Tensors:
    M, K, N = (shape[name] for name in "MKN")
    return {"x": torch.randn(M, K), "weight": torch.randn(N, K) * K**-0.5, "bias": torch.randn(N)}


def _ours(t: Tensors) -> Callable[[], Outputs]:
    return lambda: (linear(t["x"], t["weight"], t["bias"]),)


def _work(shape: Shape, phase: Phase, itemsize: int) -> Work:
    """Forward: one GEMM of x and W. Backward: one more for each of their gradients."""
    M, K, N = (shape[name] for name in "MKN")
    flops, inputs, output = 2 * M * K * N, M * K + N * K, M * N
    if phase != "forward+backward":
        return Work(flops, (inputs + output) * itemsize)
    return Work(3 * flops, (3 * inputs + 2 * output) * itemsize)


SUBJECT = Subject(
    op="linear",
    shapes=_shapes,
    make=_make,
    eager=lambda t: (F.linear(t["x"], t["weight"], t["bias"]),),
    ours=_ours,
    layer=_ours,
    baselines={},
    work=_work,
)


def test_linear(trial: Trial, benchmark: BenchmarkFixture) -> None:
    trial.run(benchmark)
