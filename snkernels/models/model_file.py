"""The file of a stitched model: what it says beside the weights, and whether that fits a model."""

from __future__ import annotations

import copy
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from snkernels.models import checkpoint
from snkernels.models.anchors import Anchor, check_pair, describe
from snkernels.models.selection import check_scores
from snkernels.models.setting import shapes_of
from snkernels.models.vit import PlainViT
from snkernels.routing.latency import Profile
from snkernels.routing.space import LARGE

if TYPE_CHECKING:
    from snkernels.models.stitched import StitchedViT


def save(model: StitchedViT, path: str | os.PathLike[str], notes: Mapping[str, Any] | None) -> None:
    """Write a model; see ``StitchedViT.save``."""
    if model.profile is not None:  # or nobody could load it
        model.profile.check_model(shapes_of(model))
    anchors = [{**describe(vit), "arguments": _arguments(vit)} for vit in model.anchors]
    config = {
        "anchors": anchors,
        "rank": model.rank,
        "sampling": model._sampling,
        "sampler": model.sampler.state_dict(),
        "notes": dict(notes or {}),
        "default_route": model.default_route,
        "scores": model.scores,
        "profile": None if model.profile is None else model.profile.to_json(),
    }
    checkpoint.write(path, model.state_dict(), config)


def _arguments(vit: Anchor) -> dict[str, Any] | None:
    """Return what builds a ``PlainViT`` of the same shape; None where nothing does."""
    arguments: dict[str, Any] | None
    arguments = getattr(vit, "config", None) if type(vit) is PlainViT else None
    if arguments is None:
        return None
    with torch.device("meta"):
        built = PlainViT(**arguments)
    try:
        checkpoint.check_tensors("anchor", vit.state_dict(), built.state_dict())
    except ValueError:  # the head was replaced, say: to load it, anchors must be given
        return None
    return arguments


def restore(model: StitchedViT, path: str | os.PathLike[str]) -> None:
    """Load a file into a model that is there; see ``StitchedViT.restore``."""
    tensors, config = checkpoint.read(path)
    _check_fit(model, str(path), tensors, config)
    _fill(model, tensors, config)


def load(
    kind: type[StitchedViT],
    path: str | os.PathLike[str],
    anchors: tuple[Anchor, Anchor] | None,
) -> StitchedViT:
    """Build a model from a file; see ``StitchedViT.load``."""
    tensors, config = checkpoint.read(path)
    if anchors is None:
        if any(saved["arguments"] is None for saved in config["anchors"]):
            kinds = " and ".join(saved["class"] for saved in config["anchors"])
            raise TypeError(f"anchors must be given: those in {path} are {kinds}")
    else:
        check_pair(*anchors)
    with checkpoint.building(path):
        small, large = anchors or (PlainViT(**saved["arguments"]) for saved in config["anchors"])
        model = kind(small, large, config["rank"], **config["sampling"])
    _check_fit(model, str(path), tensors, config)
    for key, parameter in model.named_parameters():
        if key in tensors:
            parameter.data = parameter.data.to(tensors[key].dtype)
    _fill(model, tensors, config)
    return model


def _check_fit(
    model: StitchedViT, path: str, tensors: dict[str, Tensor], config: dict[str, Any]
) -> None:
    """Check that ``_fill`` can take over what ``checkpoint.read`` found in ``path``."""
    for name, vit, saved in zip(("small", "large"), model.anchors, config["anchors"], strict=True):
        for fact, value in describe(vit).items():
            if saved[fact] != value:
                raise ValueError(
                    f"{path} does not fit this model: {fact} of its {name} anchor is "
                    f"{saved[fact]}, here it is {value}"
                )
    for setting, value in model._sampling.items():
        if config["sampling"][setting] != value:
            raise ValueError(
                f"{path} does not fit this model: {setting} of its sampling is "
                f"{config['sampling'][setting]!r}, here it is {value!r}"
            )
    checkpoint.check_tensors(path, tensors, model.state_dict())
    with checkpoint.building(path):
        copy.copy(model.sampler).load_state_dict(config["sampler"])
        model.space.route(_default_route(config))
        _measured(model, config)


def _fill(model: StitchedViT, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    model.load_state_dict(tensors)
    model.sampler.load_state_dict(config["sampler"])
    model.default_route = _default_route(config)
    model.scores, model.profile = _measured(model, config)


def _default_route(config: dict[str, Any]) -> int:
    return LARGE if config["default_route"] is None else config["default_route"]


def _measured(
    model: StitchedViT, config: dict[str, Any]
) -> tuple[dict[int, float] | None, Profile | None]:
    """Return the scores and the profile in the config of a file, checked."""
    scores, profile = config["scores"], config["profile"]
    if scores is not None:
        scores = check_scores({int(key): score for key, score in scores.items()}, model.space)
    if profile is not None:
        profile = Profile.from_json(profile)
        profile.check_model(shapes_of(model))
    return scores, profile
