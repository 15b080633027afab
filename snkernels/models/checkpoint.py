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
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from snkernels.files import replacing
from snkernels.integers import integer, is_one

_FORMAT = "snkernels.StitchedViT/1"

# What the config must hold, for `_check`.
_ANCHOR = {
    "class": str,
    "img_size": [int],
    "patch_size": int,
    "num_heads": [int],
    "norm_eps": [int | float],
    "act": str,
    "global_pool": str,
    "arguments": dict | None,
}
# Files from before these existed lack them, and hold none.
_LATER = {"scores": dict | None, "profile": dict | None, "default_route": int | None}
_CONFIG = {
    "anchors": (_ANCHOR, _ANCHOR),
    "rank": int,
    "sampling": {"gap": int | float | None, "tilt": int, "draws": str},
    "sampler": {"seed": int, "draws": int},
    "notes": dict,
    **_LATER,
}

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
        TypeError: If ``num_heads`` holds no integers.
        ValueError: If it is not such a checkpoint, or ``num_heads`` are not two; the message says
            what is wrong.
    """
    heads = (None, None) if num_heads is None else _two_ints("num_heads", num_heads)
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
    lora = [key for key in official if key.endswith(".lora_A")]
    return OfficialCheckpoint(
        anchors=(_anchor_config(official, 0, heads[0]), _anchor_config(official, 1, heads[1])),
        rank=_shape(official, lora[0], 2)[0] if lora else 0,
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
    metadata = {"format": _FORMAT, "config": json.dumps(config)}
    contiguous = {key: value.detach().contiguous() for key, value in tensors.items()}
    with replacing(path) as partial:
        save_file(contiguous, partial, metadata)


def read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what ``write`` wrote: tensors on the CPU, and the config.

    Raises:
        OSError: If the file cannot be opened.
        ValueError: If it is truncated, not of this format, or its config lacks a value or has one
            of another type.
    """
    if Path(path).is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file in it")
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
    try:
        config = json.loads(metadata.get("config", ""))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} holds no config in JSON: {error}") from error
    if isinstance(config, dict):
        config = {**dict.fromkeys(_LATER), **config}
    _check(f"the config of {path}", config, _CONFIG)
    return tensors, config


@contextmanager
def building(path: str | os.PathLike[str]) -> Iterator[None]:
    """Report whatever fails while a model is built from the config in ``path`` as its fault.

    Raises:
        ValueError: In place of the error; the message names the path.
    """
    try:
        yield
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(f"{path} holds a config that no model can have: {error}") from error


def check_tensors(name: str, given: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> None:
    """Check keys, shapes and kinds of ``given`` against ``wanted``, so that loading cannot fail.

    Any floating dtype stands for any other.

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
    faults += [
        f"{key} must be {'' if wanted[key].is_floating_point() else 'no '}floating point, "
        f"got {given[key].dtype}"
        for key in wanted
        if key in given and wanted[key].is_floating_point() != given[key].is_floating_point()
    ][:3]
    if faults:
        raise ValueError(f"{name} does not fit this model: {'; '.join(faults)}")


def _check(where: str, value: Any, wanted: Any) -> None:
    """Check a value from JSON against a type, or a dict, tuple or list of what its items must be.

    A tuple has one entry per item, a list one for all items.
    """
    containers: dict[Any, Any] = {dict: dict, tuple: list, list: list}
    kind = containers.get(type(wanted), wanted)
    if not isinstance(value, kind):
        name = kind.__name__ if isinstance(kind, type) else kind
        raise ValueError(f"{where} must be {name}, got {value!r:.80}")
    if isinstance(wanted, dict):
        for key, item in wanted.items():
            if key not in value:
                raise ValueError(f"{where} lacks {key!r}")
            _check(f"{key!r} in {where}", value[key], item)
    elif isinstance(wanted, tuple | list):
        items = wanted * len(value) if isinstance(wanted, list) else wanted
        if len(value) != len(items):
            raise ValueError(f"{where} must hold {len(items)} items, got {len(value)}")
        for i, item in enumerate(items):
            _check(f"item {i} of {where}", value[i], item)


def _two_ints(name: str, values: Any) -> tuple[int, int]:
    if is_one(values):
        raise TypeError(f"{name} must be two integers, got {values!r:.80}")
    if len(values) != 2:
        raise ValueError(f"{name} must be two integers, got {len(values)}")
    small, large = (integer(f"each of {name}", value, 1) for value in values)
    return small, large


def _shape(official: Mapping[str, Tensor], key: str, ndim: int) -> tuple[int, ...]:
    """Return the shape of a tensor that must be there, of ``ndim`` dimensions, and not empty."""
    if key not in official:
        raise ValueError(f"the official checkpoint lacks {key}")
    shape = tuple(official[key].shape)
    if len(shape) != ndim or 0 in shape:
        raise ValueError(f"{key} must have {ndim} dimensions, none of them 0, got shape {shape}")
    return shape


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
    width, in_chans, patch_size, _ = _shape(official, f"{prefix}patch_embed.proj.weight", 4)
    patches = _shape(official, f"{prefix}pos_embed", 3)[1]
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
    blocks = {int(key.split(".")[3]) for key in official if key.startswith(f"{prefix}blocks.")}
    if gaps := set(range(len(blocks))) - blocks:
        raise ValueError(
            f"blocks of {prefix[:-1]} must be numbered without gaps, "
            f"got {max(blocks)} but not {min(gaps)}"
        )
    return {
        "img_size": side * patch_size,
        "patch_size": patch_size,
        "in_chans": in_chans,
        "num_classes": _shape(official, f"{prefix}head.weight", 2)[0],
        "embed_dim": width,
        "depth": len(blocks),
        "num_heads": num_heads,
        "mlp_ratio": _shape(official, f"{prefix}blocks.0.mlp.fc1.weight", 2)[0] / width,
        "qkv_bias": f"{prefix}blocks.0.attn.qkv.bias" in official,
    }


def _some(keys: list[str]) -> str:
    more = len(keys) - 3
    return ", ".join(keys[:3]) + (f" and {more} more" if more > 0 else "")
