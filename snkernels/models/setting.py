"""What a latency depends on: the device and its surroundings, and the shapes of the model."""

from __future__ import annotations

import platform
from dataclasses import asdict
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from snkernels.backends import forced_backend
from snkernels.models.anchors import vit_shape
from snkernels.routing.latency import Setting

if TYPE_CHECKING:
    from snkernels.models.stitched import StitchedViT


def setting_of(model: StitchedViT) -> Setting:
    """Where the model is, in which dtype, and how it runs there."""
    like = next(model.parameters())
    kind = like.device.type
    on_gpu = kind == "cuda"
    autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
    return Setting(
        device=torch.cuda.get_device_name(like.device) if on_gpu else _processor(),
        threads=None if on_gpu else torch.get_num_threads(),
        dtype=str(like.dtype).removeprefix("torch."),
        torch=torch.__version__,
        autocast=None if autocast is None else str(autocast).removeprefix("torch."),
        backend=forced_backend(),
        compiled=is_compiled(model),
    )


def is_compiled(model: StitchedViT) -> bool:
    """Whether any part of it is compiled where it stands."""
    return any(module._compiled_call_impl is not None for module in model.modules())


def shapes_of(model: StitchedViT) -> dict[str, Any]:
    """The shapes of both anchors and the rank of the stitches, in values that JSON can hold."""
    anchors = [
        {
            **asdict(vit_shape(vit)),
            "num_heads": [block.attn.num_heads for block in vit.blocks],
            "global_pool": vit.global_pool,
        }
        for vit in (model.small, model.large)
    ]
    return {"anchors": anchors, "rank": model.rank}


@lru_cache(maxsize=1)
def _processor() -> str:
    """The name of the CPU; ``platform`` does not know it on Linux."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    facts = [tuple(part.strip() for part in line.split(":", 1)) for line in lines if ":" in line]
    names = [value for fact, value in facts if fact == "model name"]
    if names:
        return names[0]
    # ARM has numbers instead, of each kind of core.
    parts = {f"{fact} {value}" for fact, value in facts if fact in ("CPU implementer", "CPU part")}
    return ", ".join([platform.processor() or platform.machine(), *sorted(parts)])
