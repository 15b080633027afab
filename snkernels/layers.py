"""Drop-in layers on the ops, with the state-dict keys and shapes of the official SN-Netv2 layer."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from snkernels.integers import integer
from snkernels.ops import stitch, stitch_layer_norm
from snkernels.reference import merged_weight

# Subclasses of nn.LayerNorm with a forward of their own that computes the same.
_SAME_AS_LAYER_NORM = {"timm.layers.norm.LayerNorm"}


def is_layer_norm(norm: nn.Module) -> bool:
    """Whether a module computes what nn.LayerNorm does, so that an op may do it instead."""
    kind = type(norm)
    name = f"{kind.__module__}.{kind.__qualname__}"
    return isinstance(norm, nn.LayerNorm) and (
        kind.forward is nn.LayerNorm.forward or name in _SAME_AS_LAYER_NORM
    )


class LowRankProjection(nn.Module):
    """The parameters of a low-rank stitching layer: frozen W, trainable bias, A and B.

    A is drawn as Kaiming-uniform with a = √5 and B is zero, so that training starts from W.
    """

    lora_A: nn.Parameter | None
    lora_B: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        in_features = integer("in_features", in_features, 1)
        out_features = integer("out_features", out_features, 1)
        rank = integer("rank", rank, 0)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, **options), requires_grad=False
        )
        self.bias = nn.Parameter(torch.zeros(out_features, **options))
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        if rank == 0:
            self.register_parameter("lora_A", None)
            self.register_parameter("lora_B", None)
            return
        self.lora_A = nn.Parameter(torch.empty(rank, in_features, **options))
        self.lora_B = nn.Parameter(torch.zeros(out_features, rank, **options))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))


class _Merged:
    """A merged weight, and copies of what it was made from.

    The copies are compared whole at each use: version counters miss what is written through
    ``.data``, as many EMA loops do, and a stale weight would be wrong in silence.
    """

    def __init__(self, sources: tuple[Tensor, Tensor, Tensor], scaling: float) -> None:
        weight, lora_A, lora_B = self.sources = tuple(s.detach().clone() for s in sources)
        self.weight = merged_weight(weight, lora_A, lora_B, scaling)

    def made_from(self, sources: tuple[Tensor, Tensor, Tensor]) -> bool:
        return all(
            old.dtype == new.dtype and old.device == new.device and torch.equal(old, new)
            for old, new in zip(self.sources, sources, strict=True)
        )


class StitchingLayer(nn.Module):
    """Low-rank stitching layer: y = x Wᵀ + b + (x Aᵀ) Bᵀ / rank (SN-Netv2, §3.3).

    Parameters are ``transform.weight`` (frozen), ``transform.bias``, ``transform.lora_A`` and
    ``transform.lora_B``, never merged. In inference on the CPU (eval mode, no gradients) the merged
    weight is kept as a cache beside them and compared with them at each use, so no order of
    loading, training, copying and saving can make it contradict them. A GPU would have to wait for
    the comparison, and runs the low-rank part instead.

    Args:
        in_features: width of the anchor that is left.
        out_features: width of the anchor that is entered.
        rank: LoRA rank; 0 for no low-rank part.
        device: where the parameters are made.
        dtype: of the parameters.

    Raises:
        TypeError, ValueError: a width or rank that is no integer, a width below 1, a negative rank.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.transform = LowRankProjection(
            in_features, out_features, rank, device=device, dtype=dtype
        )
        self.out_features, self.in_features = self.transform.weight.shape
        self.rank = 0 if self.transform.lora_A is None else len(self.transform.lora_A)
        self.scaling = 1.0 / self.rank if self.rank else 1.0
        self._merged: _Merged | None = None

    def forward(self, x: Tensor) -> Tensor:
        """The projection of tokens x (..., in_features) → (..., out_features); see ops.stitch."""
        return stitch(x, *self._operands(x))

    def forward_norm(self, x: Tensor, norm: nn.LayerNorm) -> tuple[Tensor, Tensor]:
        """(y, norm(y)) in one op, where ``norm`` is the entry block's own LayerNorm.

        Raises:
            TypeError: a norm that is no nn.LayerNorm, or computes something else.
            ValueError: a LayerNorm over anything but the last ``out_features`` values.
        """
        if not is_layer_norm(norm):
            raise TypeError(f"norm must be a torch.nn.LayerNorm, but it is {type(norm).__name__}")
        if tuple(norm.normalized_shape) != (self.out_features,):
            raise ValueError(
                f"norm must normalise ({self.out_features},), "
                f"but it normalises {tuple(norm.normalized_shape)}"
            )
        return stitch_layer_norm(x, *self._operands(x), norm.weight, norm.bias, norm.eps)

    @torch.no_grad()
    def set_base(self, weight: Tensor, bias: Tensor) -> None:
        """Copies W (out, in) and bias (out,) in, for instance a least-squares solution."""
        for name, parameter, value in (
            ("weight", self.transform.weight, weight),
            ("bias", self.transform.bias, bias),
        ):
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{name} must have shape {tuple(parameter.shape)}, "
                    f"but it has {tuple(value.shape)}"
                )
            parameter.copy_(value)

    def extra_repr(self) -> str:
        """The sizes, for print(model)."""
        return f"{self.in_features}, {self.out_features}, rank={self.rank}"

    def train(self, mode: bool = True) -> "StitchingLayer":
        """Sets the mode, as for any module; training frees the merged weight."""
        if mode:
            self._merged = None
        return super().train(mode)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_merged": None}  # copies and pickles make their own

    def _operands(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, float]:
        t = self.transform
        if (
            t.lora_A is None
            or t.lora_B is None
            or self.training
            or torch.is_grad_enabled()
            or x.device.type != "cpu"
            or torch.compiler.is_compiling()
        ):
            return t.weight, t.bias, t.lora_A, t.lora_B, self.scaling
        sources = (t.weight, t.lora_A, t.lora_B)
        merged = self._merged  # read once: other threads may put theirs in its place
        if merged is None or not merged.made_from(sources):
            merged = self._merged = _Merged(sources, self.scaling)
        return merged.weight, t.bias, None, None, self.scaling


class StitchLayerNorm(nn.Module):
    """A stitching layer and the LayerNorm behind it as one op that returns (y, LN(y)).

    Args:
        in_features: width of the tokens that come in.
        out_features: width of both outputs.
        rank: LoRA rank; 0 for no low-rank part.
        eps: of the LayerNorm; ViTs use 1e-6.
        device: where the parameters are made.
        dtype: of the parameters.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        rank: int,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.stitch = StitchingLayer(in_features, out_features, rank, device=device, dtype=dtype)
        self.norm = nn.LayerNorm(out_features, eps=eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Tokens (..., in_features) → y and LN(y), both (..., out_features)."""
        return self.stitch.forward_norm(x, self.norm)
