from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

from snkernels.models.vit import DropPath, PlainViT


def test_timm_deit3_loads_by_name_and_gives_the_same_logits(
    timm: ModuleType, randomise: Callable[[nn.Module], None]
) -> None:
    sizes: dict[str, Any] = {"img_size": 32, "depth": 3, "num_classes": 7, "drop_path_rate": 0.5}
    theirs = timm.create_model("deit3_small_patch16_224", **sizes)
    randomise(theirs)
    ours = PlainViT(embed_dim=384, num_heads=6, **sizes)
    ours.load_state_dict(theirs.state_dict())
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(ours.eval()(images), theirs.eval()(images))
    torch.testing.assert_close(ours.forward_features(images), theirs.forward_features(images))
    # In training both draw the same stochastic depth from the same generator.
    torch.manual_seed(1)
    drawn = ours.train()(images)
    torch.manual_seed(1)
    torch.testing.assert_close(drawn, theirs.train()(images))


def test_the_forward_is_the_formula() -> None:
    """One head, one block, written out: patches, positions, class token, pre-norm block, head."""
    vit = PlainViT(4, 2, 1, num_classes=3, embed_dim=4, depth=1, num_heads=1).double()
    with torch.no_grad():
        for parameter in vit.parameters():
            parameter.normal_()
    p = dict(vit.named_parameters())
    images = torch.randn(1, 1, 4, 4, dtype=torch.float64)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        centred = x - x.mean(-1, keepdim=True)
        scaled = centred / (centred.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        return scaled * p[f"{name}.weight"] + p[f"{name}.bias"]

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ p[f"{name}.weight"].T + p[f"{name}.bias"]

    patches = torch.stack(
        [images[0, 0, i : i + 2, j : j + 2].flatten() for i in (0, 2) for j in (0, 2)]
    )
    tokens = patches @ p["patch_embed.proj.weight"].flatten(1).T + p["patch_embed.proj.bias"]
    x = torch.cat((p["cls_token"][0], tokens + p["pos_embed"][0]))
    q, k, v = linear(norm(x, "blocks.0.norm1"), "blocks.0.attn.qkv").split(4, -1)
    attended = linear((q @ k.T / 2).softmax(-1) @ v, "blocks.0.attn.proj")
    x = x + p["blocks.0.ls1.gamma"] * attended
    hidden = linear(norm(x, "blocks.0.norm2"), "blocks.0.mlp.fc1")
    hidden = hidden * (1 + torch.erf(hidden / 2**0.5)) / 2
    x = x + p["blocks.0.ls2.gamma"] * linear(hidden, "blocks.0.mlp.fc2")
    logits = linear(norm(x, "norm")[0], "head")
    torch.testing.assert_close(vit(images)[0], logits, rtol=1e-10, atol=1e-10)


def test_optional_parts_leave_no_parameter() -> None:
    vit = PlainViT(8, 4, depth=1, embed_dim=8, num_heads=2, num_classes=0, init_values=None)
    names = {name for name, _ in vit.named_parameters()}
    assert not any("ls1" in name or "head" in name for name in names)
    assert vit(torch.randn(2, 3, 8, 8)).shape == (2, 8)
    no_bias = PlainViT(8, 4, depth=1, embed_dim=8, num_heads=2, qkv_bias=False)
    assert "blocks.0.attn.qkv.bias" not in dict(no_bias.named_parameters())


def test_images_need_not_be_square() -> None:
    vit = PlainViT((8, 12), 4, depth=1, embed_dim=8, num_heads=2, num_classes=3)
    assert vit.patch_embed.grid_size == (2, 3)
    assert vit(torch.randn(2, 3, 8, 12)).shape == (2, 3)


def test_drop_path_grows_linearly_and_keeps_the_mean() -> None:
    vit = PlainViT(8, 4, depth=5, embed_dim=8, num_heads=2, drop_path_rate=0.4)
    rates = [block.drop_path2.drop_prob for block in vit.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])
    drop = DropPath(0.4).train()
    out = drop(torch.ones(20_000, 2, 3))
    per_sample = out.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.6).item()}
    # Standard error of the mean: sqrt(0.4 / 0.6 / 20000) = 0.006.
    assert out.mean().item() == pytest.approx(1.0, abs=0.03)
    assert torch.equal(drop.eval()(per_sample), per_sample)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth must be positive, got 0"),
        ({"num_classes": -1}, "num_classes must not be negative, got -1"),
        ({"img_size": 10}, "multiple of patch_size, got 10x10 and 4"),
        ({"num_heads": 3}, "multiple of num_heads, got 8 and 3"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate must be in \[0, 1\), got 1.0"),
    ],
)
def test_bad_sizes_are_named(arguments: dict[str, Any], message: str) -> None:
    good = {"img_size": 8, "patch_size": 4, "embed_dim": 8, "num_heads": 2, "depth": 1}
    with pytest.raises(ValueError, match=message):
        PlainViT(**{**good, **arguments})
