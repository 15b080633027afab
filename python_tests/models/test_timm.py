"""Anchors from timm: what such a model does by itself, every route must do too."""

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snkernels.models.anchors import check_anchor, embed, finish, vit_shape
from snkernels.models.stitched import StitchedViT
from snkernels.models.vit import PlainViT
from snkernels.profiling import profile
from snkernels.routing.cost import ViTShape
from snkernels.routing.latency import PARTS

MakeTimm = Callable[..., Any]

DEIT3 = {"no_embed_class": True, "init_values": 1e-6}
KINDS: dict[str, dict[str, Any]] = {
    "deit3": DEIT3,
    "augreg": {},
    "dinov2 with registers": {"no_embed_class": True, "init_values": 1.0, "reg_tokens": 4},
    "clip": {"pre_norm": True},
    "mean pooling": {"global_pool": "avg", "class_token": False},
    "mean and maximum pooling": {"global_pool": "avgmax", "pool_include_prefix": True},
    "no position embedding": {"pos_embed": "none"},
    "scaled norms": {"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True},
}


@pytest.fixture
def make_timm(timm: ModuleType, randomise: Callable[[nn.Module], None]) -> MakeTimm:
    """Build a tiny timm VisionTransformer in eval mode with random parameters."""

    def build(**changes: Any) -> Any:
        sizes = {"img_size": 8, "patch_size": 4, "num_classes": 5, "num_heads": 3, "depth": 2}
        vit = timm.models.VisionTransformer(**{**sizes, "embed_dim": 12, **changes})
        randomise(vit)
        return vit.eval()

    return build


def by_hand(model: StitchedViT, images: Tensor) -> Tensor:
    """Run route 2 of depths (2, 3), S0 → L2, with timm's own forward for all but the stitch."""
    small, large = model.anchors
    seen: list[Tensor] = []
    hook = small.blocks[0].register_forward_hook(lambda *call: seen.append(call[2]))
    small(images)
    hook.remove()
    t = model.stitch_layers[0][0].transform
    weight = t.weight + t.lora_B @ t.lora_A / t.lora_A.shape[0]
    return large.forward_head(large.norm(large.blocks[2](F.linear(seen[0], weight, t.bias))))


@pytest.mark.parametrize("kind", KINDS)
def test_routes_of_every_kind_of_vit(
    make_timm: MakeTimm, randomise: Callable[[nn.Module], None], kind: str
) -> None:
    small, large = make_timm(**KINDS[kind]), make_timm(embed_dim=24, depth=3, **KINDS[kind])
    model = StitchedViT(small, large, rank=2).eval().double()
    randomise(model.stitch_layers)
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    torch.testing.assert_close(model(images, stitch=0), small(images))
    torch.testing.assert_close(model(images, stitch=1), large(images))
    assert str(model.space.route(2)) == "S0 → L2"
    torch.testing.assert_close(model(images, stitch=2), by_hand(model, images))
    model(images, stitch=2).square().sum().backward()
    trained = sum(p.numel() for p in model.parameters() if p.grad is not None)
    frozen = model.stitch_layers[0][0].transform.weight.numel()
    assert model.routes[2].parameters == trained + frozen
    assert model.routes[0].parameters == sum(p.numel() for p in small.parameters())
    model.init_stitches(images)
    assert model(images, stitch=2).isfinite().all()


def test_images_of_another_size_where_the_vits_resample(make_timm: MakeTimm) -> None:
    dynamic = {**DEIT3, "dynamic_img_size": True}
    small, large = make_timm(**dynamic), make_timm(embed_dim=24, depth=3, **dynamic)
    model = StitchedViT(small, large).eval()
    for size in ((8, 8), (12, 16)):
        images = torch.randn(1, 3, *size)
        torch.testing.assert_close(model(images, stitch=1), large(images))
        assert model(images, stitch=2).shape == (1, 5)
    with pytest.raises(ValueError, match=r"\(batch, 3, H, W multiples of 4\), got \(1, 3, 8, 9\)"):
        model(torch.randn(1, 3, 8, 9), stitch=1)
    with pytest.raises(ValueError, match="agree in fixed image size, got False and True"):
        StitchedViT(small, make_timm(**DEIT3))
    padded = {**dynamic, "dynamic_img_pad": True}
    model = StitchedViT(make_timm(**padded), make_timm(**padded)).eval()
    assert model(torch.randn(1, 3, 7, 9), stitch=2).shape == (1, 5)


def test_patch_dropout_drops_in_training_only(make_timm: MakeTimm) -> None:
    small, large = make_timm(patch_drop_rate=0.5), make_timm(patch_drop_rate=0.5, depth=4)
    model = StitchedViT(small, large)
    tokens: list[int] = []
    large.blocks[2].mlp.register_forward_hook(lambda *call: tokens.append(call[2].shape[1]))
    images = torch.randn(2, 3, 8, 8)
    model.train()(images, stitch=1)
    model.train()(images, stitch=2)
    model.eval()(images, stitch=2)
    assert tokens[0] == tokens[1] == 1 + 2
    model.init_stitches(images)
    assert tokens[2:] == [1 + 4, 1 + 4]


@pytest.mark.parametrize("kind", KINDS)
def test_training_draws_the_stochastic_depth_of_timm(make_timm: MakeTimm, kind: str) -> None:
    vit = make_timm(drop_path_rate=0.5, depth=3, **KINDS[kind]).double().train()
    images = torch.randn(6, 3, 8, 8, dtype=torch.float64)
    torch.manual_seed(1)
    expected = vit(images)
    torch.manual_seed(1)
    torch.testing.assert_close(finish(vit, embed(vit, images), 0), expected)
    torch.manual_seed(2)
    assert not torch.allclose(finish(vit, embed(vit, images), 0), expected)


def test_only_the_class_token_passes_the_last_mlp_where_the_head_reads_it_alone(
    make_timm: MakeTimm,
) -> None:
    images = torch.randn(2, 3, 8, 8)
    tokens: list[int] = []
    for kind, expected in (("dinov2 with registers", 1), ("mean pooling", 4), ("scaled norms", 5)):
        vit = make_timm(**KINDS[kind])
        vit.blocks[-1].mlp.register_forward_hook(lambda *call: tokens.append(call[2].shape[1]))
        finish(vit, embed(vit, images), 0)
        assert tokens.pop() == expected, kind


def test_a_head_that_reads_two_tokens_is_given_both(
    timm: ModuleType, randomise: Callable[[nn.Module], None]
) -> None:
    sizes = {"img_size": 8, "patch_size": 4, "num_classes": 5, "num_heads": 3, "depth": 2}
    vit = timm.models.deit.VisionTransformerDistilled(**sizes, embed_dim=12).eval()
    randomise(vit)
    images = torch.randn(2, 3, 8, 8)
    torch.testing.assert_close(finish(vit, embed(vit, images), 0), vit(images))


def test_a_hook_inside_attention_sees_every_block(make_timm: MakeTimm) -> None:
    vit = make_timm(**DEIT3)
    seen: list[int] = []
    for i, block in enumerate(vit.blocks):
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda *_, i=i: seen.append(i))
    finish(vit, embed(vit, torch.randn(2, 3, 8, 8)), 0)
    assert seen == [0, 1]


def test_a_budget_of_known_costs_is_for_images_of_their_size(make_timm: MakeTimm) -> None:
    dynamic = {**DEIT3, "dynamic_img_size": True}
    model = StitchedViT(make_timm(**dynamic), make_timm(embed_dim=24, depth=3, **dynamic)).eval()
    model.scores = {route.id: route.id for route in model.routes}
    large = torch.randn(2, 3, 12, 16)
    assert model(large, budget=1.0).shape == (2, 5)
    assert model(torch.randn(2, 3, 8, 8), budget="1 GFLOPs").shape == (2, 5)
    message = r"budget must be a share for images of \(3, 12, 16\): .* known for \(3, 8, 8\)"
    for budget in ("1 GFLOPs", [0.5, "1 GFLOPs"]):
        with pytest.raises(ValueError, match=message):
            model(large, budget=budget)


def test_a_plain_vit_and_a_timm_vit_fit_together(
    make_timm: MakeTimm, make_vit: Callable[..., PlainViT]
) -> None:
    model = StitchedViT(make_vit(depth=3, embed_dim=24), make_timm(depth=3, **DEIT3)).eval()
    images = torch.randn(4, 3, 8, 8)
    model.init_stitches(images)
    torch.testing.assert_close(model(images, stitch=1), model.large(images))
    assert model(images, stitch=2).shape == (4, 5)


def test_prefix_tokens_must_agree(make_timm: MakeTimm) -> None:
    with pytest.raises(ValueError, match="agree in prefix tokens, got 1 and 5"):
        StitchedViT(make_timm(), make_timm(reg_tokens=4))


def test_what_cannot_be_stitched_is_told_why(timm: ModuleType, make_timm: MakeTimm) -> None:
    vision_transformer = timm.models.vision_transformer
    for changes, message in (
        ({"global_pool": "map"}, "has an attention pool"),
        ({"block_fn": vision_transformer.ResPostBlock}, "must be a pre-norm block.* no ls1, ls2"),
        ({"block_fn": vision_transformer.ParallelScalingBlock}, "no norm1, attn"),
        ({"block_fn": vision_transformer.ParallelThingsBlock}, "no norm1, attn"),
        ({"norm_layer": "rmsnorm"}, "LayerNorm as norm1.* has RmsNorm"),
    ):
        with pytest.raises(TypeError, match=message):
            check_anchor(make_timm(**changes), "small")
    with pytest.raises(TypeError, match=r"large \(ResNet\) must be a plain ViT"):
        check_anchor(timm.create_model("resnet18"), "large")


def test_shapes_of_registers_and_gated_mlps(timm: ModuleType, make_timm: MakeTimm) -> None:
    assert vit_shape(make_timm(reg_tokens=4)) == ViTShape(12, 2, 9, 4, 4, 3, 5, 4.0)
    gated = make_timm(mlp_layer=timm.layers.SwiGLUPacked, mlp_ratio=64 / 12)
    mlp = gated.blocks[0].mlp
    matrices = mlp.fc1.weight.numel() + mlp.fc2.weight.numel()
    assert vit_shape(gated).mlp_ratio * 2 * 12 * 12 == pytest.approx(matrices)


def test_deit3_weights_have_a_place_in_the_official_layout(make_timm: MakeTimm) -> None:
    model = StitchedViT(
        make_timm(embed_dim=64, num_heads=1, **DEIT3),
        make_timm(embed_dim=128, num_heads=2, depth=4, **DEIT3),
    ).eval()
    ours = StitchedViT.from_snnetv2(model.to_snnetv2()).eval()
    assert isinstance(ours.large, PlainViT)
    images = torch.randn(2, 3, 8, 8)
    for route in model.routes:
        torch.testing.assert_close(
            ours(images, stitch=route.id), model(images, stitch=route.id), rtol=1e-4, atol=1e-5
        )


def test_our_file_fills_timm_anchors(make_timm: MakeTimm, tmp_path: Path) -> None:
    def pair(**changes: Any) -> tuple[Any, Any]:
        return make_timm(**changes), make_timm(depth=3, **changes)

    path = tmp_path / "model.safetensors"
    model = StitchedViT(*pair()).eval()
    model.save(path)
    with pytest.raises(TypeError, match=r"anchors must be given: .* VisionTransformer"):
        StitchedViT.load(path)
    again = StitchedViT.load(path, pair()).eval()
    images = torch.randn(2, 3, 8, 8)
    assert torch.equal(again(images, stitch=2), model(images, stitch=2))
    with pytest.raises(ValueError, match="act of its small anchor is GELU, here it is ReLU"):
        StitchedViT.load(path, pair(act_layer="relu"))


@pytest.fixture
def profiled(make_timm: MakeTimm) -> StitchedViT:
    """A pair of DeiT3's kind with its own profile, at batch 1 and 3."""
    model = StitchedViT(make_timm(depth=3, **DEIT3), make_timm(embed_dim=24, depth=6, **DEIT3))
    model.profile = profile(model, [1, 3], rounds=1, seconds=0)
    return model


def test_every_part_of_a_timm_pair_has_a_latency(profiled: StitchedViT) -> None:
    measured = profiled.profile
    assert measured is not None
    for size, parts in measured.parts.items():
        for part in PARTS:
            assert all(seconds > 0 for seconds in getattr(parts, part)), part
        for route in profiled.routes:
            start, end = route.segments[0].anchor, route.segments[-1].anchor
            expected = parts.embed[start] + parts.finish[end]
            for i, segment in enumerate(route.segments):
                last = i == len(route.segments) - 1
                blocks = segment.stop - segment.start - 1
                expected += blocks * parts.block[segment.anchor]
                expected += 0 if last else parts.exit[segment.anchor] + parts.switch[segment.anchor]
            assert measured.seconds(route, size) == pytest.approx(expected)
    between = measured.seconds(2, 2)
    ends = measured.seconds(2, 1), measured.seconds(2, 3)
    assert between == pytest.approx(sum(ends) / 2)
    assert {check.batch_size for check in measured.checks} == {1, 3}
    assert all(check.measured > 0 and check.predicted > 0 for check in measured.checks)


def test_a_timm_pair_picks_a_route_by_time(profiled: StitchedViT) -> None:
    measured = profiled.profile
    assert measured is not None
    profiled.scores = {route.id: float(route.id) for route in profiled.routes}
    seconds = {route.id: measured.seconds(route, 3) for route in profiled.routes}
    for limit in sorted(seconds.values()):
        chosen = profiled.select(f"{limit * 1.0001!r} s", batch_size=3)
        fitting = [id for id, cost in seconds.items() if cost <= limit * 1.0001]
        assert (chosen.route.id, chosen.fitting) == (max(fitting), len(fitting))
        assert chosen.cost == seconds[chosen.route.id]
    dearest = max(seconds.values()) * 1.0001
    images = torch.randn(3, 3, 8, 8)
    by_budget = profiled.eval()(images, budget=f"{dearest!r} s")
    assert torch.equal(by_budget, profiled(images, stitch=max(seconds)))
    with pytest.raises(ValueError, match="budget must reach for a route"):
        profiled.select(f"{min(seconds.values()) / 2!r} s", batch_size=3)
