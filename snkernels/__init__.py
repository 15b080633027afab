"""Fused kernels and a model layer for stitched vision transformers.

Names are imported when first used, so ``import snkernels`` costs nothing and cannot fail for a
missing part.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from snkernels import layers, ops
    from snkernels.backends import use_backend
    from snkernels.distributed import average_gradients, broadcast_parameters
    from snkernels.evaluation import evaluate
    from snkernels.models.stitched import StitchedViT
    from snkernels.models.vit import PlainViT
    from snkernels.profiling import profile
    from snkernels.routing.latency import Profile
    from snkernels.training import distillation_loss, training_loss
    from snkernels.warm_up import warmup

    __version__: str

__all__ = [
    "PlainViT",
    "Profile",
    "StitchedViT",
    "__version__",
    "average_gradients",
    "broadcast_parameters",
    "distillation_loss",
    "evaluate",
    "layers",
    "ops",
    "profile",
    "training_loss",
    "use_backend",
    "warmup",
]

_HOMES = {
    "PlainViT": "snkernels.models.vit",
    "Profile": "snkernels.routing.latency",
    "StitchedViT": "snkernels.models.stitched",
    "average_gradients": "snkernels.distributed",
    "broadcast_parameters": "snkernels.distributed",
    "distillation_loss": "snkernels.training",
    "evaluate": "snkernels.evaluation",
    "profile": "snkernels.profiling",
    "training_loss": "snkernels.training",
    "use_backend": "snkernels.backends",
    "warmup": "snkernels.warm_up",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(_HOMES[name]), name)
    elif name in ("layers", "ops"):
        value = importlib.import_module(f"snkernels.{name}")
    elif name == "__version__":
        from importlib.metadata import version

        value = version("snkernels")
    else:
        raise AttributeError(f"module 'snkernels' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
