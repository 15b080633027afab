"""Checkpoints on disk: the official SN-Netv2 layout, and our own file.

Nothing here knows the model: it reads files into tensors and plain values, checks them, and writes
them.  ``StitchedViT`` builds itself from what comes out.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

_FORMAT = "snkernels.StitchedViT/1"

# One entry per parameter name of an official anchor that is ours under another name.
_TO_OURS = {"gamma_1": "ls1.gamma", "gamma_2": "ls2.gamma"}
_TO_OFFICIAL = {ours: official for official, ours in _TO_OURS.items()}
_OFFICIAL_KEY = re.compile(
    r"anchors\.[01]\.(?:cls_token|pos_embed|(?:patch_embed\.proj|norm|head)\.(?:weight|bias)"
    r"|blocks\.\d+\.(?:gamma_[12]"
    r"|(?:norm1|attn\.qkv|attn\.proj|norm2|mlp\.fc1|mlp\.fc2)\.(?:weight|bias)))"
    r"|stitch_layers\.[01]\.\d+\.transform\.(?:weight|bias|lora_A|lora_B)"
)


@dataclass(frozen=True)
class OfficialCheckpoint:
    """An official checkpoint, taken apart.

    Attributes:
        anchors: Arguments of ``PlainViT`` for the small and the large anchor.
        rank: Rank of the stitches' low-rank part; 0 without one.
        state: The tensors under our names.
    """

    anchors: tuple[dict[str, Any], dict[str, Any]]
    rank: int
    state: dict[str, Tensor]


def read_snnetv2(
    source: str | os.PathLike[str] | Mapping[str, Any], num_heads: tuple[int, int] | None = None
) -> OfficialCheckpoint:
    """Read a checkpoint of the official SN-Netv2 release.

    Args:
        source: A file that ``torch.save`` wrote, or what ``torch.load`` made of one: the state dict
            itself or a mapping with it under ``"model"``.  From a file come tensors, plain values
            and an ``argparse.Namespace``; anything else in it is refused and nothing is executed.
        num_heads: Attention heads of the small and the large anchor.  The file does not hold them;
            None means one per 64 channels, as all DeiT III models have.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is not such a checkpoint; the message says what is wrong.
    """
    if isinstance(source, Mapping):
        name, loaded = "the state dict", source
    else:
        name, loaded = str(source), _load_pickle(source)
    if not isinstance(loaded, Mapping):
        raise ValueError(f"{name} must hold a mapping, got {type(loaded).__name__}")
    official = loaded.get("model", loaded)
    if not isinstance(official, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in official.items()
    ):
        raise ValueError(f"{name} must hold a state dict, as it is or under 'model'")
    foreign = [key for key in official if not _OFFICIAL_KEY.fullmatch(key)]
    if foreign or not official:
        raise ValueError(
            f"{name} is no official SN-Netv2 checkpoint: "
            + (f"unknown {_some(foreign)}" if foreign else "it is empty")
        )
    heads = num_heads or (None, None)
    lora = [value for key, value in official.items() if key.endswith(".lora_A")]
    return OfficialCheckpoint(
        anchors=(_anchor_config(official, 0, heads[0]), _anchor_config(official, 1, heads[1])),
        rank=lora[0].shape[0] if lora else 0,
        state={_rename(key, _TO_OURS): value for key, value in official.items()},
    )


def to_snnetv2(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a model's state dict under the names of the official release.

    Raises:
        ValueError: If a tensor has no place in that layout; the message names it.
    """
    official = {_rename(key, _TO_OFFICIAL): value for key, value in state.items()}
    foreign = [key for key in official if not _OFFICIAL_KEY.fullmatch(key)]
    if foreign:
        raise ValueError(f"the official layout has no place for {_some(foreign)}")
    return official


def write(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> None:
    """Write tensors and a JSON config into one safetensors file.

    The file appears under ``path`` when it is complete and on disk; until then whatever was there
    stays.

    Args:
        path: Where to write.
        tensors: Tensors on any device, none sharing memory with another.
        config: Values that JSON can hold.

    Raises:
        OSError: If the file cannot be written.
    """
    path = Path(path)
    metadata = {"format": _FORMAT, "config": json.dumps(config)}
    contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        partial = Path(folder, path.name)
        save_file(contiguous, partial, metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write`` wrote: tensors on the CPU, and the config.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is truncated or not of this format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != _FORMAT:
                raise ValueError(
                    f"{path} is no checkpoint of ours: its format must be {_FORMAT!r}, "
                    f"got {metadata.get('format')!r}"
                )
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is truncated or no safetensors file: {error}") from error
    return tensors, json.loads(metadata["config"])


def check_tensors(name: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check that ``given`` has the keys and shapes of ``wanted``, so that loading it cannot fail.

    Raises:
        ValueError: If not; the message names what differs.
    """
    faults = []
    if missing := [key for key in wanted if key not in given]:
        faults.append(f"it lacks {_some(missing)}")
    if unexpected := [key for key in given if key not in wanted]:
        faults.append(f"it has {_some(unexpected)} that the model lacks")
    faults += [
        f"{key} must have shape {tuple(wanted[key].shape)}, got {tuple(given[key].shape)}"
        for key in wanted
        if key in given and wanted[key].shape != given[key].shape
    ][:3]
    if faults:
        raise ValueError(f"{name} does not fit this model: {'; '.join(faults)}")


def _load_pickle(path: str | os.PathLike[str]) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # torch raises many kinds for a file that is not as it must be
        raise ValueError(
            f"{path} must be a torch.save file of tensors, plain values and an argparse.Namespace: "
            f"{error}"
        ) from error


def _rename(key: str, names: Mapping[str, str]) -> str:
    for old, new in names.items():
        if key.startswith("anchors.") and key.endswith(f".{old}"):
            return key.removesuffix(old) + new
    return key


def _anchor_config(
    official: Mapping[str, Tensor], index: int, num_heads: int | None
) -> dict[str, Any]:
    """Infer the arguments of PlainViT from the official tensors of one anchor."""
    prefix = f"anchors.{index}."

    def get(name: str) -> Tensor:
        if prefix + name not in official:
            raise ValueError(f"the official checkpoint lacks {prefix + name}")
        return official[prefix + name]

    width, in_chans, patch_size, _ = get("patch_embed.proj.weight").shape
    patches = get("pos_embed").shape[1]
    side = math.isqrt(patches)
    if side * side != patches:
        raise ValueError(f"{prefix}pos_embed must cover a square grid, got {patches} patches")
    if num_heads is None:
        if width % 64:
            raise ValueError(
                f"num_heads must be given: {prefix[:-1]} is {width} wide, "
                "which is no multiple of 64 channels per head"
            )
        num_heads = width // 64
    depth = 1 + max(
        (int(key.split(".")[3]) for key in official if key.startswith(f"{prefix}blocks.")),
        default=-1,
    )
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": get("head.weight").shape[0],
        "embed_dim": width,
        "depth": depth,
        "num_heads": num_heads,
        "mlp_ratio": get("blocks.0.mlp.fc1.weight").shape[0] / width,
        "qkv_bias": f"{prefix}blocks.0.attn.qkv.bias" in official,
    }


def _some(keys: list[str]) -> str:
    more = len(keys) - 3
    return ", ".join(keys[:3]) + (f" and {more} more" if more > 0 else "")
