"""The ops under test: how each is called, what eager torch would do, and on which shapes.

An op that is added to OPS is judged by every test of test_every_op.py.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from device import DEVICE
from torch import Tensor

from snkernels.ops import (
    StitchGroup,
    multi_stitch,
    multi_stitch_layer_norm,
    residual_layer_norm,
    stitch,
    stitch_layer_norm,
)

Tensors = dict[str, Tensor]
EPS = 1e-6


@dataclass(frozen=True)
class Shape:
    M: int
    K: int
    N: int
    r: int

    def __str__(self) -> str:
        return f"M{self.M}-K{self.K}-N{self.N}-r{self.r}"


SHAPES = [
    Shape(50, 104, 200, 16),  # multiples of 8, as the Hopper kernel takes them
    Shape(7, 33, 65, 4),
    Shape(1, 1, 1, 1),
    Shape(130, 40, 24, 0),
    Shape(19, 64, 30, 128),
    Shape(300, 270, 40, 20),  # more rows and columns than one block of the sums over K and M
]


@dataclass(frozen=True)
class Op:
    """``call`` and ``eager`` take the tensors by name and the scaling, and return a tuple.

    ``tokens`` names the tensor that decides the dtype, ``vectors`` the optional ones of the output
    width, ``others`` the optional ones that come and go together, and ``library`` the op that runs.
    """

    call: Callable[[Tensors, float], tuple[Tensor, ...]]
    eager: Callable[[Tensors, float], tuple[Tensor, ...]]
    tokens: str
    vectors: tuple[str, ...]
    others: tuple[str, ...]
    library: str


def _stitch(t: Tensors, scaling: float) -> tuple[Tensor, ...]:
    return (stitch(t["x"], t["weight"], t.get("bias"), t.get("lora_A"), t.get("lora_B"), scaling),)


def _eager_stitch(t: Tensors, scaling: float) -> tuple[Tensor, ...]:
    x = t["x"]
    p = {name: value.to(x.dtype) for name, value in t.items()}
    y = F.linear(x, p["weight"], p.get("bias"))
    if "lora_A" in p:
        y = y + x @ p["lora_A"].t() @ p["lora_B"].t() * scaling
    return (y,)


def _stitch_layer_norm(t: Tensors, scaling: float) -> tuple[Tensor, ...]:
    return stitch_layer_norm(
        t["x"],
        t["weight"],
        t.get("bias"),
        t.get("lora_A"),
        t.get("lora_B"),
        scaling,
        t.get("norm_weight"),
        t.get("norm_bias"),
        EPS,
    )


def _eager_stitch_layer_norm(t: Tensors, scaling: float) -> tuple[Tensor, ...]:
    (y,) = _eager_stitch(t, scaling)
    affine = (t[name].to(y.dtype) if name in t else None for name in ("norm_weight", "norm_bias"))
    return y, F.layer_norm(y, y.shape[-1:], *affine, EPS)


def _in_groups(t: Tensors) -> tuple[list[int], list[Tensors]]:
    """Offsets and parameters of three groups: t's own, an empty one, t's in another order."""
    rows = t["x"].shape[0]
    own = {name: value for name, value in t.items() if name != "x"}
    other = {name: value.flip(0) for name, value in own.items()}
    return [0, rows // 3, rows // 3, rows], [own, own, other]


def _multi_stitch(t: Tensors, scaling: float) -> tuple[Tensor, ...]:
    offsets, groups = _in_groups(t)
    return (multi_stitch(t["x"], offsets, [StitchGroup(**g, scaling=scaling) for g in groups]),)


def _multi_stitch_layer_norm(t: Tensors, scaling: float) -> tuple[Tensor, ...]:
    offsets, groups = _in_groups(t)
    groups = [StitchGroup(**g, scaling=scaling) for g in groups]
    return multi_stitch_layer_norm(t["x"], offsets, groups, EPS)


def _each_group(eager: Callable[..., tuple[Tensor, ...]]) -> Callable[..., tuple[Tensor, ...]]:
    def run(t: Tensors, scaling: float) -> tuple[Tensor, ...]:
        offsets, groups = _in_groups(t)
        parts = [
            eager(group | {"x": t["x"][start:stop]}, scaling)
            for group, start, stop in zip(groups, offsets, offsets[1:], strict=False)
        ]
        return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))

    return run


SAMPLES = 5  # of drop_path_scale, which has one value for each


def _residual_layer_norm(t: Tensors, scaling: float) -> tuple[Tensor, ...]:
    h = t["h"]
    scale = t.get("drop_path_scale")
    shape = h.shape if scale is None else (scale.shape[0], -1, h.shape[-1])
    outputs = residual_layer_norm(
        h.reshape(shape),
        t["branch"].reshape(shape),
        t.get("layer_scale"),
        scale,
        t.get("norm_weight"),
        t.get("norm_bias"),
        EPS,
    )
    return tuple(output.view(h.shape) for output in outputs)


def _eager_residual_layer_norm(t: Tensors, scaling: float) -> tuple[Tensor, ...]:
    h = t["h"]
    p = {name: value.to(h.dtype) for name, value in t.items()}
    branch = p["branch"]
    if "layer_scale" in p:
        branch = branch * p["layer_scale"]
    if "drop_path_scale" in p:
        each = h.shape[0] // p["drop_path_scale"].shape[0]
        branch = branch * p["drop_path_scale"].repeat_interleave(each)[:, None]
    total = h + branch
    affine = (p.get(name) for name in ("norm_weight", "norm_bias"))
    return total, F.layer_norm(total, total.shape[-1:], *affine, EPS)


LOW_RANK = ("lora_A", "lora_B")
STITCHES = {
    "stitch": Op(_stitch, _eager_stitch, "x", ("bias",), LOW_RANK, "stitch"),
    "stitch_layer_norm": Op(
        _stitch_layer_norm,
        _eager_stitch_layer_norm,
        "x",
        ("bias", "norm_weight", "norm_bias"),
        LOW_RANK,
        "stitch_layer_norm",
    ),
}
GROUPED = {
    "multi_stitch": Op(
        _multi_stitch, _each_group(_eager_stitch), "x", ("bias",), LOW_RANK, "multi_stitch"
    ),
    "multi_stitch_layer_norm": Op(
        _multi_stitch_layer_norm,
        _each_group(_eager_stitch_layer_norm),
        "x",
        ("bias", "norm_weight", "norm_bias"),
        LOW_RANK,
        "multi_stitch",
    ),
}
OPS = {
    **STITCHES,
    **GROUPED,
    "residual_layer_norm": Op(
        _residual_layer_norm,
        _eager_residual_layer_norm,
        "h",
        ("layer_scale", "norm_weight", "norm_bias"),
        ("drop_path_scale",),
        "residual_layer_norm",
    ),
}


def make(
    op: Op, shape: Shape, dtype: torch.dtype, parameter_dtype: torch.dtype | None = None
) -> Tensors:
    """Random arguments of sizes as in a trained model; lora_B is not zero, or it would hide A."""
    parameter_dtype = parameter_dtype or dtype
    if op.tokens == "h":
        tensors = {name: torch.randn(shape.M, shape.N).to(dtype) for name in ("h", "branch")}
        if shape.M % SAMPLES == 0:
            kept = torch.arange(SAMPLES) % 3 > 0
            tensors["drop_path_scale"] = (kept / 0.6).to(parameter_dtype)
    else:
        tensors = {
            "x": torch.randn(shape.M, shape.K).to(dtype),
            "weight": (torch.randn(shape.N, shape.K) * shape.K**-0.5).to(parameter_dtype),
        }
    for name in op.vectors:
        tensors[name] = torch.randn(shape.N).to(parameter_dtype)
    if shape.r and op.others == LOW_RANK:
        tensors["lora_A"] = (torch.randn(shape.r, shape.K) * shape.K**-0.5).to(parameter_dtype)
        tensors["lora_B"] = torch.randn(shape.N, shape.r).to(parameter_dtype)
    return tensors


def learnt(tensors: Tensors) -> tuple[str, ...]:
    """The names of the tensors that have a gradient."""
    return tuple(name for name in tensors if name != "drop_path_scale")


def run(
    function: Callable[[Tensors, float], tuple[Tensor, ...]],
    tensors: Tensors,
    *,
    dtype: torch.dtype | None = None,
    wanted: tuple[str, ...] | None = None,
) -> Tensors:
    """Outputs and gradients by name, of a loss that weighs every output value differently."""
    leaves = {
        name: value.detach()
        .to(dtype or value.dtype)
        .requires_grad_(name in (learnt(tensors) if wanted is None else wanted))
        for name, value in tensors.items()
    }
    outputs = function(leaves, 0.25)
    generator = torch.Generator(DEVICE).manual_seed(1)
    weights = [torch.randn(o.shape, generator=generator).to(o.dtype) for o in outputs]
    differentiable = [(o, w) for o, w in zip(outputs, weights, strict=True) if o.requires_grad]
    names = [name for name, leaf in leaves.items() if leaf.requires_grad]
    grads = torch.autograd.grad(
        [o for o, _ in differentiable],
        [leaves[name] for name in names],
        [w for _, w in differentiable],
        materialize_grads=True,  # of no rows no group has any
    )
    results = {f"output {i}": output.detach() for i, output in enumerate(outputs)}
    return results | {f"grad of {name}": grad for name, grad in zip(names, grads, strict=True)}
