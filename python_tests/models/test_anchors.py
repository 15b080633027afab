from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from snkernels.models.anchors import (
    check_anchor,
    check_images,
    check_pair,
    embed,
    embed_parameters,
    finish,
    readout_parameters,
    run_blocks,
    vit_shape,
)
from snkernels.models.vit import PlainViT
from snkernels.routing.cost import ViTShape

MakeViT = Callable[..., PlainViT]


def test_the_parts_in_order_are_the_whole(make_vit: MakeViT) -> None:
    vit = make_vit(depth=3)
    images = torch.randn(2, 3, 8, 8)
    tokens = embed(vit, images)
    assert tokens.shape == (2, 5, 12)
    for start in range(3):
        halfway = run_blocks(vit, tokens, 0, start)
        torch.testing.assert_close(finish(vit, halfway, start), vit(images))


def test_a_block_can_be_entered_after_its_norm(make_vit: MakeViT) -> None:
    vit = make_vit(depth=3)
    tokens = torch.randn(2, 5, 12)
    normed = vit.blocks[1].norm1(tokens)
    torch.testing.assert_close(run_blocks(vit, tokens, 1, 3, normed), run_blocks(vit, tokens, 1, 3))
    # What enters the attention is the tensor that was handed in, not one computed anew.
    other = run_blocks(vit, tokens, 1, 3, torch.zeros_like(normed))
    assert not torch.allclose(other, run_blocks(vit, tokens, 1, 3))
    torch.testing.assert_close(finish(vit, tokens, 1, normed), finish(vit, tokens, 1))
    assert not torch.allclose(finish(vit, tokens, 1, normed * 2), finish(vit, tokens, 1))


def test_entering_draws_the_block_s_own_stochastic_depth(make_vit: MakeViT) -> None:
    vit = make_vit(depth=2, drop_path_rate=0.5).train()
    tokens = torch.randn(64, 5, 12)
    torch.manual_seed(1)
    entered = run_blocks(vit, tokens, 1, 2, vit.blocks[1].norm1(tokens))
    torch.manual_seed(1)
    torch.testing.assert_close(entered, run_blocks(vit, tokens, 1, 2))


def test_running_no_block_changes_nothing(make_vit: MakeViT) -> None:
    tokens = torch.randn(2, 5, 12)
    assert run_blocks(make_vit(), tokens, 1, 1) is tokens


def test_shape_of_deit3_small() -> None:
    with torch.device("meta"):
        vit = PlainViT(embed_dim=384, depth=12, num_heads=6)
    assert vit_shape(vit) == ViTShape(384, 12, 197, 196, 16, 3, 1000, 4.0)


def test_shape_follows_every_argument() -> None:
    vit = PlainViT(
        (8, 12), 4, in_chans=1, num_classes=7, embed_dim=8, depth=2, num_heads=2, mlp_ratio=3.0
    )
    assert vit_shape(vit) == ViTShape(8, 2, 7, 6, 4, 1, 7, 3.0)


def test_parameters_of_the_ends(make_vit: MakeViT) -> None:
    vit = make_vit()
    names = {id(parameter): name for name, parameter in vit.named_parameters()}
    assert {names[id(p)] for p in embed_parameters(vit)} == {
        "cls_token",
        "pos_embed",
        "patch_embed.proj.weight",
        "patch_embed.proj.bias",
    }
    assert {names[id(p)] for p in readout_parameters(vit)} == {
        "norm.weight",
        "norm.bias",
        "head.weight",
        "head.bias",
    }


class NoViT(nn.Module):
    pass


def without(part: str, vit: PlainViT) -> PlainViT:
    owner, _, name = part.rpartition(".")
    delattr(vit.get_submodule(owner), name)
    return vit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda vit: NoViT(), r"small \(NoViT\) must be a plain ViT .* no patch_embed, _pos_embed"),
        (lambda vit: without("norm", vit), "it has no norm$"),
        (lambda vit: without("blocks.1.ls1", vit), r"block 1 \(Block\), .* pre-norm .* no ls1$"),
        (lambda vit: without("blocks.0.mlp.fc2", vit), r"block 0 .* MLP .* no fc2$"),
        (
            lambda vit: setattr(vit.blocks[1], "norm1", nn.RMSNorm(12)) or vit,
            "block 1 .* LayerNorm as norm1.* has RMSNorm",
        ),
        (lambda vit: setattr(vit, "attn_pool", nn.Identity()) or vit, "it has an attention pool"),
        (
            lambda vit: setattr(vit.patch_embed, "patch_size", (4, 2)) or vit,
            r"square patches, got \(4, 2\)",
        ),
    ],
)
def test_what_is_no_anchor_is_told_why(
    make_vit: MakeViT, damage: Callable[[PlainViT], nn.Module], message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        check_anchor(damage(make_vit()), "small")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"img_size": 16}, r"image size, got \(8, 8\) and \(16, 16\)"),
        ({"in_chans": 1}, "image channels, got 3 and 1"),
        ({"patch_size": 2}, r"patch grid, got \(2, 2\) and \(4, 4\)"),
        ({"num_classes": 6}, "classes, got 5 and 6"),
    ],
)
def test_anchors_must_agree(make_vit: MakeViT, changes: dict[str, Any], message: str) -> None:
    check_pair(make_vit(), make_vit(depth=4, embed_dim=24))
    with pytest.raises(ValueError, match=f"small and large must agree in {message}"):
        check_pair(make_vit(), make_vit(**changes))


def test_anchors_without_a_head_give_features_of_their_width(make_vit: MakeViT) -> None:
    check_pair(make_vit(num_classes=0), make_vit(num_classes=0, depth=4))
    with pytest.raises(ValueError, match="small and large must agree in outputs, got 12 and 24"):
        check_pair(make_vit(num_classes=0), make_vit(num_classes=0, embed_dim=24))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda vit: vit.double(), r"dtype, got torch\.float32 and torch\.float64"),
        (lambda vit: vit.to("meta"), "device, got cpu and meta"),
    ],
)
def test_anchors_must_be_of_one_dtype_in_one_place(
    make_vit: MakeViT, change: Callable[[PlainViT], PlainViT], message: str
) -> None:
    with pytest.raises(ValueError, match=f"small and large must agree in {message}"):
        check_pair(make_vit(), change(make_vit()))


class OfAllTokens(PlainViT):
    """Calls itself one that pools by the class token, but does not."""

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        return self.head(x.mean(1))


def test_a_head_of_its_own_is_given_all_tokens() -> None:
    images = torch.randn(2, 3, 8, 8)
    vit = OfAllTokens(8, 4, 3, 5, embed_dim=12, depth=2, num_heads=3).eval()
    torch.testing.assert_close(finish(vit, embed(vit, images), 0), vit(images))
    vit = PlainViT(8, 4, 3, 5, embed_dim=12, depth=2, num_heads=3).eval()
    vit.forward_head = lambda x: vit.head(x.mean(1))  # type: ignore[method-assign]
    torch.testing.assert_close(finish(vit, embed(vit, images), 0), vit(images))


class Centred(nn.Module):
    """Looks at all tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(1, keepdim=True)


def test_a_norm_of_its_own_is_given_all_tokens(make_vit: MakeViT) -> None:
    vit, images = make_vit(), torch.randn(2, 3, 8, 8)
    vit.norm = Centred()
    torch.testing.assert_close(finish(vit, embed(vit, images), 0), vit(images))


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_blocks_that_are_run_again_give_the_same_gradients(make_vit: MakeViT, rate: float) -> None:
    vit = make_vit(depth=3, drop_path_rate=rate).double().train()
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    calls: list[None] = []
    vit.blocks[1].mlp.register_forward_hook(lambda *_: calls.append(None))

    def gradients() -> list[Tensor]:
        torch.manual_seed(1)
        loss = finish(vit, embed(vit, images), 0).square().sum()
        return list(torch.autograd.grad(loss, list(vit.parameters())))

    expected = gradients()
    assert len(calls) == 1
    vit.set_grad_checkpointing()
    for actual, one in zip(gradients(), expected, strict=True):
        assert torch.equal(actual, one)
    assert len(calls) == 1 + 2
    with torch.no_grad():
        finish(vit, embed(vit, images), 0)
    assert len(calls) == 1 + 2 + 1, "without gradients nothing is run again"


@pytest.mark.parametrize("shape", [(2, 1, 8, 8), (2, 3, 8, 4), (3, 8, 8), (2, 3, 8, 8, 1)])
def test_images_of_another_shape_are_refused(make_vit: MakeViT, shape: tuple[int, ...]) -> None:
    check_images(make_vit(), torch.zeros(0, 3, 8, 8))
    with pytest.raises(ValueError, match=r"shape \(batch, 3, 8, 8\), got \(\d"):
        check_images(make_vit(), torch.zeros(shape))


@pytest.mark.parametrize("images", [[1.0], np.zeros((2, 3, 8, 8), np.float32), None])
def test_images_must_be_a_tensor(make_vit: MakeViT, images: Any) -> None:
    with pytest.raises(TypeError, match=f"images must be a tensor, got {type(images).__name__}"):
        check_images(make_vit(), images)


def test_images_must_be_as_the_model_is(make_vit: MakeViT) -> None:
    vit, images = make_vit(), torch.zeros(2, 3, 8, 8, dtype=torch.float64)
    with pytest.raises(TypeError, match=r"images must be torch\.float32 .*, got torch\.float64"):
        check_images(vit, images)
    with torch.autocast("cpu", torch.bfloat16):
        check_images(vit, images.bfloat16())
        assert finish(vit, embed(vit, images.bfloat16()), 0).dtype is torch.bfloat16
        with pytest.raises(TypeError, match=r"images must be torch\.float32 .* torch\.float64"):
            check_images(vit, images)
    with pytest.raises(ValueError, match="images must be on cpu as the model, got meta"):
        check_images(vit, torch.zeros(2, 3, 8, 8, device="meta"))


def test_images_must_be_floats(make_vit: MakeViT) -> None:
    with pytest.raises(TypeError, match=r"images must be floating point, got torch.uint8"):
        check_images(make_vit(), torch.zeros(2, 3, 8, 8, dtype=torch.uint8))
