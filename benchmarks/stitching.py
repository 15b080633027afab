"""What the benchmarks of the stitching ops share: the paper's shapes, projections and work."""

import itertools
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.subject import Baseline, Bind, Outputs, Phase, Shape, Tensors, Work
from snkernels.kernels import native
from snkernels.layers import StitchingLayer

TOKENS = 197  # of a 224 × 224 image in patches of 16, with the class token
EPS = 1e-6
NAMES = ("weight", "bias", "lora_A", "lora_B", "norm_weight", "norm_bias")  # of a group

Projection = Callable[[Tensors], Tensor]
Finish = Callable[[Tensors, Tensor], Outputs]


def shapes(images: int) -> list[Shape]:
    """The stitches between DeiT3-S (384), B (768) and L (1024) at the paper's LoRA ranks."""

    def shape(label: str, K: int, N: int, r: int, compiled: bool = False) -> Shape:
        return Shape(label, {"M": images * TOKENS, "K": K, "N": N, "r": r}, compiled)

    # What must be reached on a CPU is said of every stitch from S and L, on a GPU of S→L alone, and
    # to compile more would take time that a lent GPU does not have.
    on_a_cpu = images < 64
    return [
        shape("S→L", 384, 1024, 64, compiled=True),
        shape("L→S", 1024, 384, 64, compiled=True),
        shape("B→L", 768, 1024, 64),
        shape("S→B", 384, 768, 64, compiled=on_a_cpu),
        shape("S→L", 384, 1024, 16),
        shape("S→L", 384, 1024, 0),
        call(K=8, N=8, r=4),
    ]


def call(**sizes: int) -> Shape:
    """One row so small that a call's time is its overhead, with next to no arithmetic in it.

    Many calls in a row: after a call of a rival's, one alone waits for its own code and data.
    """
    return Shape("call", {"M": 1, **sizes}, calls=100, cached=True)


def make(shape: Shape) -> Tensors:
    """Arguments of stitch."""
    M, K, N, r = (shape[name] for name in "MKNr")
    tensors = {
        "x": torch.randn(M, K),
        "weight": torch.randn(N, K) * K**-0.5,
        "bias": torch.randn(N),
    }
    if r:
        tensors["lora_A"] = torch.randn(r, K) * K**-0.5
        tensors["lora_B"] = torch.randn(N, r)
    return tensors


def scaling(t: Tensors) -> float:
    """1/r, as in the paper."""
    return 1.0 / len(t["lora_A"]) if "lora_A" in t else 1.0


def eager(t: Tensors) -> Tensor:
    """The official layer's formula, with its in-place sum."""
    y = F.linear(t["x"], t["weight"], t["bias"])
    if "lora_A" in t:
        y += (t["x"] @ t["lora_A"].t() @ t["lora_B"].t()) * scaling(t)
    return y


def addmm(t: Tensors) -> Tensor:
    """The same as a chain of addmm."""
    y = torch.addmm(t["bias"], t["x"], t["weight"].t())
    if "lora_A" in t:
        y = torch.addmm(y, t["x"] @ t["lora_A"].t(), t["lora_B"].t(), alpha=scaling(t))
    return y


def merged_weight(t: Tensors) -> Tensor:
    """W with the low-rank part added."""
    if "lora_A" not in t:
        return t["weight"]
    return torch.addmm(t["weight"], t["lora_B"], t["lora_A"], alpha=scaling(t))


def _merge_each_call(t: Tensors) -> Tensor:
    return F.linear(t["x"], merged_weight(t), t["bias"])


def baselines(finish: Finish) -> dict[str, Baseline]:
    """Ways to project, each followed by ``finish``.

    At rank 0 they are all one linear layer: what differs there is the noise of the measurement.
    """

    def plain(projection: Projection) -> Bind:
        return lambda t: lambda: finish(t, projection(t))

    def merged(t: Tensors) -> Callable[[], Outputs]:
        weight = merged_weight(t).detach()
        return lambda: finish(t, F.linear(t["x"], weight, t["bias"]))

    return {
        "addmm": Baseline(plain(addmm)),
        "merged": Baseline(merged, lacks=("lora_A", "lora_B")),
        "merge each call": Baseline(plain(_merge_each_call)),
    }


def layer(t: Tensors) -> StitchingLayer:
    """The drop-in layer in eval mode with these parameters."""
    (N, K), x = t["weight"].shape, t["x"]
    rank = len(t["lora_A"]) if "lora_A" in t else 0
    made = StitchingLayer(K, N, rank, device=x.device, dtype=x.dtype).eval()
    made.transform.load_state_dict(
        {name: t[name] for name in ("weight", "bias", "lora_A", "lora_B") if name in t}
    )
    return made


def bare(
    x: Tensor, offsets: Sequence[int], groups: Sequence[Tensors], normalize: bool
) -> Callable[[], Outputs]:
    """The compiled function that all stitching ops call, with its arguments and outputs ready."""
    packed = [
        (start, stop, scaling(own), *(own.get(name) for name in NAMES))
        for (start, stop), own in zip(itertools.pairwise(offsets), groups, strict=True)
    ]
    features = len(groups[0]["weight"])
    outputs = native.norm_outputs(x, features, normalize=normalize)
    wanted = outputs if normalize else (outputs[0], None, None, None)
    results = outputs[: 2 if normalize else 1]
    stitch_forward, threads = native._C.stitch_forward, torch.get_num_threads()

    def run() -> Outputs:
        stitch_forward(x, packed, features, EPS, *wanted, threads)
        return results

    return run


def work(shape: Shape, phase: Phase, itemsize: int, outputs: int) -> Work:
    """Every tensor read or written once per pass, and the GEMMs of the cheapest algorithm.

    That is: the low-rank part merged into W (before the call in inference, in the call in
    training), the frozen W without a gradient. Row statistics, element-wise arithmetic and vectors
    are left out.
    """
    M, K, N, r = (shape[name] for name in "MKNr")
    low_rank = r * (K + N)
    flops, elements = 2 * M * N * K, M * K + N * K + outputs * M * N
    if phase != "inference":
        flops += 2 * N * K * r
        elements += low_rank
    if phase == "forward+backward":
        flops += 2 * M * N * K + 4 * M * low_rank
        # In: gradients of the outputs, x, W, A, B, and y where a norm follows. Out: of x, A, B.
        elements += outputs * M * N + M * K + N * K + low_rank + (outputs - 1) * M * N
        elements += M * K + low_rank
    return Work(flops, elements * itemsize)
