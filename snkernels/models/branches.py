"""The branches of a block, attention and MLP, part by part.

So their linear layers run by ``ops.linear``, and attention can be that of the class token alone.
Parts whose class is known, and that nobody has hooked, wrapped or compiled, are run here; whatever
else there is, is called as the module that it is.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from snkernels.ops import linear

# Classes whose forward is known to be what is done here part by part.
_ATTENTIONS = frozenset(
    {
        "snkernels.models.vit.Attention",
        "timm.layers.attention.Attention",
        "timm.models.vision_transformer.Attention",
    }
)
_MLPS = frozenset({"snkernels.models.vit.Mlp", "timm.layers.mlp.Mlp"})
_LINEARS = frozenset({"torch.nn.modules.linear.Linear"})
_IDENTITIES = frozenset({"torch.nn.modules.linear.Identity"})
_DROPOUTS = frozenset({"torch.nn.modules.dropout.Dropout"})


def in_parts(module: Any) -> Callable[[Tensor], Tensor]:
    """Return what maps tokens (B, N, width) as ``module`` does, part by part where that may be."""
    if module._compiled_call_impl is None:
        parts: dict[str, Any] = module._modules
        if is_plain_attention(module):
            qkv, proj = map(_projection, (parts["qkv"], parts["proj"]))
            return partial(_attend, qkv, module.num_heads, proj)
        if is_one_of(_MLPS, module) and _does_nothing_but(module, "fc1", "act", "fc2"):
            return partial(_map, _projection(parts["fc1"]), parts["act"], _projection(parts["fc2"]))
    return module


def is_plain_attention(module: nn.Module) -> bool:
    """Whether a module is qkv, softmax and proj, and nothing else in its present mode."""
    return (
        is_one_of(_ATTENTIONS, module)
        and getattr(module, "fused_attn", True)  # timm's other way reads `scale`
        and _does_nothing_but(module, "qkv", "proj")
    )


def attend_from_class_token(attention: Any, x: Tensor) -> Tensor:
    """Map tokens (B, N, width) to the first token of what plain ``attention`` gives, (B, 1, width).

    The module's own qkv is not called if it is a linear layer: most of the queries are not needed.
    """
    qkv, proj, heads = attention.qkv, _projection(attention.proj), attention.num_heads
    if not _is_linear(qkv):
        return _attend(qkv, heads, proj, x)[:, :1]
    width = qkv.out_features // 3
    q_weight, kv_weight = qkv.weight.split((width, 2 * width))
    q_bias, kv_bias = (None, None) if qkv.bias is None else qkv.bias.split((width, 2 * width))
    q = linear(x[:, :1], q_weight, q_bias).unflatten(-1, (heads, -1)).transpose(1, 2)
    kv = linear(x, kv_weight, kv_bias).unflatten(-1, (2, heads, -1)).permute(2, 0, 3, 1, 4)
    attended = F.scaled_dot_product_attention(q, *kv.unbind(0))
    return proj(attended.transpose(1, 2).flatten(2))


def is_one_of(classes: frozenset[str], module: nn.Module) -> bool:
    """Whether a module is of one of these classes, full names, and runs what stands in it."""
    kind: Any = type(module)
    return _is_named(classes, kind, kind.forward)


@lru_cache(maxsize=256)
def _is_named(classes: frozenset[str], kind: Any, forward: Any) -> bool:
    name = f"{kind.__module__}.{kind.__qualname__}"
    return name in classes and f"{forward.__module__}.{forward.__qualname__}" == f"{name}.forward"


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module does what its class says and nothing else, and does it here."""
    return module._compiled_call_impl is None and _is_unhooked(module)


def _is_unhooked(module: nn.Module) -> bool:
    return not (
        module._forward_pre_hooks
        or module._forward_hooks
        or module._backward_pre_hooks
        or module._backward_hooks
        or "forward" in vars(module)
        or _has_any_global_hook()
    )


def _does_nothing_but(module: nn.Module, *parts: str) -> bool:
    """Whether a module is these parts one after another, its others doing nothing at present."""
    others = (m for name, m in module._modules.items() if m is not None and name not in parts)
    return _is_unhooked(module) and all(
        is_untouched(m)
        and (
            is_one_of(_IDENTITIES, m)
            # Attention of timm's looks at its own mode, not at that of the dropout.
            or (is_one_of(_DROPOUTS, m) and (m.p == 0.0 or not (m.training or module.training)))
        )
        for m in others
    )


def _attend(
    qkv: Callable[..., Tensor], heads: int, proj: Callable[..., Tensor], x: Tensor
) -> Tensor:
    apart = qkv(x).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return proj(F.scaled_dot_product_attention(*apart.unbind(0)).transpose(1, 2).flatten(2))


def _map(
    fc1: Callable[..., Tensor], act: nn.Module, fc2: Callable[..., Tensor], x: Tensor
) -> Tensor:
    return fc2(act(fc1(x)))


def _projection(module: Any) -> Callable[[Tensor], Tensor]:
    """Return what maps tokens as a module does, by ``ops.linear`` if it is a linear layer."""
    return partial(_apply, module) if _is_linear(module) else module


def _apply(layer: Any, x: Tensor) -> Tensor:
    return linear(x, layer.weight, layer.bias)


def _is_linear(module: nn.Module) -> bool:
    return is_one_of(_LINEARS, module) and is_untouched(module)
