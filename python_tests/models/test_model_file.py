"""What a saved file says beside weights, and how it is taken over."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from snkernels.models.stitched import StitchedViT
from snkernels.models.vit import PlainViT
from snkernels.profiling import profile

Make = Callable[..., StitchedViT]

IMAGES = torch.randn(2, 3, 8, 8)


def test_the_default_route_goes_along(make: Make, tmp_path: Path) -> None:
    model, path = make(), tmp_path / "model.safetensors"
    model.default_route = 2
    model.save(path)
    loaded = StitchedViT.load(path).eval()
    assert loaded.default_route == 2
    torch.testing.assert_close(loaded(IMAGES), model(IMAGES, stitch=2))
    other = make()
    assert other.default_route == 1
    other.restore(path)
    assert other.default_route == 2


@pytest.mark.parametrize(("bad", "error"), [(99, ValueError), ("S", TypeError), (None, TypeError)])
def test_a_default_route_that_is_none_is_refused(
    make: Make, bad: int, error: type[Exception]
) -> None:
    model = make()
    with pytest.raises(error, match="route id must be"):
        model.default_route = bad
    assert model.default_route == 1


def test_a_new_head_goes_along(make: Make, tmp_path: Path) -> None:
    model, path = make(), tmp_path / "model.safetensors"
    for vit in model.anchors:
        vit.reset_classifier(9)
    model.save(path)
    loaded = StitchedViT.load(path).eval()
    assert [vit.num_classes for vit in loaded.anchors] == [9, 9]
    torch.testing.assert_close(loaded(IMAGES, routes="all"), model(IMAGES, routes="all"))


def test_a_profile_of_other_shapes_is_not_saved(make: Make, tmp_path: Path) -> None:
    model = make()
    model.profile = profile(model, 1, rounds=1, seconds=0.0, progress=False)
    for vit in model.anchors:
        vit.reset_classifier(9)
    with pytest.raises(ValueError, match="num_classes"):
        model.save(tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())
    model.profile = None
    model.save(tmp_path / "model.safetensors")


def test_a_head_put_in_by_hand_needs_anchors_to_fill(
    make: Make, make_vit: Callable[..., PlainViT], tmp_path: Path
) -> None:
    def changed(vit: PlainViT) -> PlainViT:
        vit.head = nn.Sequential(nn.Linear(vit.embed_dim, 7), nn.GELU(), nn.Linear(7, 5))
        return vit

    model, path = make(), tmp_path / "model.safetensors"
    for vit in model.anchors:
        changed(vit)
    model.save(path)
    with pytest.raises(TypeError, match=r"anchors must be given: .* are PlainViT and PlainViT"):
        StitchedViT.load(path)
    anchors = changed(make_vit()), changed(make_vit(depth=4, embed_dim=24))
    loaded = StitchedViT.load(path, anchors).eval()
    torch.testing.assert_close(loaded(IMAGES, routes="all"), model(IMAGES, routes="all"))
