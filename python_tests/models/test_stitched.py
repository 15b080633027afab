import copy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from snkernels.models.anchors import embed, run_blocks
from snkernels.models.stitched import StitchedViT
from snkernels.models.vit import PlainViT

Make = Callable[..., StitchedViT]


S, L = 0, 1
ROUTES_2_4 = {
    0: [(S, 0), (S, 1)],
    1: [(L, 0), (L, 1), (L, 2), (L, 3)],
    2: [(S, 0), (L, 2), (L, 3)],
    4: [(L, 0), (L, 1), (S, 1)],
}


@pytest.mark.parametrize("training", [False, True])
def test_every_route_is_its_blocks_in_order(
    make: Make, run_by_hand: Callable[..., Tensor], training: bool
) -> None:
    model = make().double().train(training)
    assert [route.id for route in model.routes] == list(ROUTES_2_4)
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    for route_id, blocks in ROUTES_2_4.items():
        expected = run_by_hand(model, blocks, images)
        torch.testing.assert_close(model(images, stitch=route_id), expected)
        assert model.last_route == route_id


@pytest.mark.parametrize("depths", [(3, 3), (3, 5), (4, 3)])
def test_every_route_of_other_depths(
    make: Make, run_by_hand: Callable[..., Tensor], depths: tuple[int, int]
) -> None:
    model = make(depths).double()
    images = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    directions = Counter(route.direction for route in model.routes)
    assert directions == {"S": 1, "L": 1, "S→L": 2, "L→S": 2, "L→S→L": 1, "S→L→S": 1}
    for route in model.routes:
        blocks = [(s.anchor, block) for s in route.segments for block in range(s.start, s.stop)]
        expected = run_by_hand(model, blocks, images)
        torch.testing.assert_close(model(images, stitch=route.id), expected)


def test_the_switch_computes_the_norm_of_the_entry_block(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """So that the fused op is what runs, the entry block's own norm1 must not run again."""
    model = make()
    norms: list[nn.Module] = []
    layer = model.stitch_layers[0][0]
    fused, apart = layer.forward_norm, nn.LayerNorm.forward
    monkeypatch.setattr(layer, "forward_norm", lambda x, norm: norms.append(norm) or fused(x, norm))
    monkeypatch.setattr(
        nn.LayerNorm, "forward", lambda norm, x: norms.append(norm) or apart(norm, x)
    )
    images = torch.randn(1, 3, 8, 8)
    entry = model.large.blocks[2]
    model(images, stitch=2)
    assert norms.count(entry.norm1) == 1
    # A block with a hook is called as a module, and so runs its own norm.
    norms.clear()
    entry.register_forward_hook(lambda *_: norms.append(entry))
    plain = model(images, stitch=2)
    assert norms.count(entry.norm1) == norms.count(entry) == 1
    torch.testing.assert_close(plain, model(images, stitch=2))


def test_gradients_reach_what_the_route_uses_and_nothing_else(make: Make) -> None:
    model = make().train()
    model(torch.randn(2, 3, 8, 8), stitch=2).square().sum().backward()
    with_grad = {name for name, p in model.named_parameters() if p.grad is not None}
    used = ("anchors.0.blocks.0.", "anchors.1.blocks.2.", "anchors.1.blocks.3.")
    used += ("anchors.0.cls_token", "anchors.0.pos_embed", "anchors.0.patch_embed.")
    used += ("anchors.1.norm.", "anchors.1.head.", "stitch_layers.0.0.")
    expected = {name for name, _ in model.named_parameters() if name.startswith(used)}
    assert with_grad == expected - {"stitch_layers.0.0.transform.weight"}


def test_routes_say_what_they_are_and_cost(make: Make) -> None:
    model = make()
    by_id = {route.id: route for route in model.routes}
    assert [str(by_id[i]) for i in (0, 1, 2, 4)] == ["S0–1", "L0–3", "S0 → L2–3", "L0–1 → S1"]
    assert by_id[2].direction == "S→L"
    assert by_id[0].parameters == sum(p.numel() for p in model.small.parameters())
    assert by_id[1].parameters == sum(p.numel() for p in model.large.parameters())
    model(torch.randn(1, 3, 8, 8), stitch=4).sum().backward()
    frozen = model.stitch_layers[1][0].transform.weight.numel()
    trained = sum(p.numel() for p in model.parameters() if p.grad is not None)
    assert by_id[4].parameters == trained + frozen
    # 5 tokens, widths 12 and 24: blocks of each anchor, embedding, stitch, norm and head.
    small, large = (12 * 5 * d * d + 2 * 25 * d + 10 * 5 * d for d in (12, 24))
    assert by_id[2].flops == 4 * 48 * 12 + small + 5 * 12 * 24 + 2 * large + 5 * 5 * 24 + 24 * 5


def test_published_costs_of_deit3_small_and_large() -> None:
    with torch.device("meta"):
        small = PlainViT(embed_dim=384, depth=12, num_heads=6)
        large = PlainViT(embed_dim=1024, depth=24, num_heads=16)
    model = StitchedViT(small, large, 64)
    assert all(p.is_meta for p in model.parameters())
    flops = {route.id: route.flops for route in model.routes}
    assert len(flops) == 134
    # From the release's table for ImageNet.
    assert [flops[i] for i in (0, 1, 2, 14)] == [
        4608338304,
        61604135936,
        56843745792,
        9523655552,
    ]


def test_training_draws_routes_from_the_sampler(make: Make) -> None:
    model, twin = make(seed=5).train(), make(seed=5).train()
    images = torch.randn(1, 3, 8, 8)
    drawn = []
    for _ in range(20):
        logits = model(images)
        drawn.append(model.last_route)
        torch.testing.assert_close(logits, model(images, stitch=drawn[-1]))
    assert drawn == [twin.sampler.draw() for _ in range(20)]
    assert set(drawn) == {0, 1, 2, 4}
    assert drawn != [make(seed=6).sampler.draw() for _ in range(20)]


def test_the_rank_is_that_of_the_draw(make: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model may be built before its process joins a group."""
    model, joined = make((3, 6)), make((3, 6))
    with monkeypatch.context() as patch:
        patch.setattr("snkernels.collectives.distributed", lambda: True)
        patch.setattr("torch.distributed.get_rank", lambda: 1)
        drawn = joined.draw(20)
    assert drawn != model.draw(20)
    other = make((3, 6))
    other.sampler.rank = 1  # such as that of a group of one's own
    assert drawn == other.draw(20)


def test_eval_runs_the_large_anchor_unless_told_otherwise(make: Make) -> None:
    model = make()
    images = torch.randn(2, 3, 8, 8)
    state = model.sampler.state_dict()
    torch.testing.assert_close(model(images), model.large(images))
    model.default_route = 0
    torch.testing.assert_close(model(images), model.small(images))
    assert model.sampler.state_dict() == state


def test_trainable_parameters_follow_the_paper(make: Make) -> None:
    model = make()
    trained = {id(p) for p in model.trainable_parameters()}
    frozen = {name for name, p in model.named_parameters() if id(p) not in trained}
    assert frozen == {
        "stitch_layers.0.0.transform.weight",
        "stitch_layers.0.1.transform.weight",
        "stitch_layers.1.0.transform.weight",
    }


@pytest.mark.parametrize("unknown", [3, 5, -1])
def test_an_unknown_route_is_refused_and_the_valid_ones_named(make: Make, unknown: int) -> None:
    with pytest.raises(ValueError, match=rf"must be in 0–2 or 4–4, got {unknown}"):
        make()(torch.randn(1, 3, 8, 8), stitch=unknown)


def test_a_refused_call_draws_nothing(make: Make) -> None:
    model = make().train()
    with pytest.raises(ValueError, match=r"images must have shape \(batch, 3, 8, 8\)"):
        model(torch.randn(1, 3, 8, 4))
    assert model.sampler.state_dict()["draws"] == 0
    assert model.last_route is None


def test_checking_images_breaks_no_graph(make: Make) -> None:
    model, images = make(), torch.full((2, 3, 8, 8), torch.nan)
    torch.compiler.reset()
    torch.compile(model._check_batch, fullgraph=True, backend="eager")(images)
    torch.compiler.reset()
    with pytest.raises(ValueError, match="images must be finite"):
        model(images)


def test_anchors_that_do_not_fit_are_refused(make_vit: Callable[..., PlainViT]) -> None:
    with pytest.raises(ValueError, match="agree in classes, got 5 and 6"):
        StitchedViT(make_vit(), make_vit(num_classes=6))
    with pytest.raises(TypeError, match=r"large \(Linear\) must be a plain ViT"):
        StitchedViT(make_vit(), nn.Linear(2, 2))
    with pytest.raises(ValueError, match="rank must be at least 0"):
        StitchedViT(make_vit(), make_vit(), rank=-1)


def test_stitches_have_the_anchors_dtype(make_vit: Callable[..., PlainViT]) -> None:
    model = StitchedViT(make_vit().double(), make_vit().double())
    assert {p.dtype for p in model.parameters()} == {torch.float64}


def test_rank_zero_has_no_low_rank_part(make: Make) -> None:
    model = make(rank=0)
    assert not any("lora" in name for name in model.state_dict())
    model.init_stitches(torch.randn(8, 3, 8, 8))
    assert model(torch.randn(2, 3, 8, 8), stitch=2).isfinite().all()


def test_a_copy_is_the_same_function_of_its_own(make: Make) -> None:
    model = make()
    twin = copy.deepcopy(model)
    images = torch.randn(1, 3, 8, 8)
    before = model(images, stitch=2)
    assert torch.equal(twin(images, stitch=2), before)
    with torch.no_grad():
        twin.anchors[0].cls_token += 1
    assert torch.equal(model(images, stitch=2), before)
    assert not torch.equal(twin(images, stitch=2), before)


def facing_tokens(model: StitchedViT, images: Tensor, cut: tuple[int, int]) -> list[Tensor]:
    """Return the tokens of small and large at a cut, one row per token."""
    with torch.no_grad():
        return [
            run_blocks(vit, embed(vit, images), 0, stop).flatten(0, 1)
            for vit, stop in zip(model.anchors, cut, strict=True)
        ]


def residual(model: StitchedViT, direction: int, index: int, images: Tensor) -> tuple[float, float]:
    """Return the squared error of a stitch, and the smallest one an affine map can have."""
    tokens = facing_tokens(model, images, model.space.cuts[index])
    source, target = tokens[direction], tokens[1 - direction]
    with torch.no_grad():
        error = (model.stitch_layers[direction][index](source) - target).square().sum().item()
    ones = torch.cat((source, torch.ones_like(source[:, :1])), dim=1)
    best = torch.linalg.lstsq(ones, target, driver="gelsd").solution
    return error, (ones @ best - target).square().sum().item()


def test_init_makes_every_stitch_the_best_affine_map(make: Make) -> None:
    model = make((2, 5)).double()
    images = torch.randn(20, 3, 8, 8, dtype=torch.float64)
    model.init_stitches(images, batch_size=7)
    for direction, count in enumerate(model.space.num_stitches):
        for index in range(count):
            error, best = residual(model, direction, index, images)
            assert best > 0
            assert error <= best * (1 + 1e-9)


def test_init_takes_tensors_loaders_and_labels(make: Make) -> None:
    images, labels = torch.randn(12, 3, 8, 8), torch.zeros(12)
    data = torch.utils.data.TensorDataset(images, labels)
    forms = [
        images,
        [images],
        ((part, "label") for part in images.split(5)),
        torch.utils.data.DataLoader(data, batch_size=4),
    ]
    weights = []
    for form in forms:
        torch.manual_seed(0)
        model = make().double()
        model.init_stitches(form)
        weights.append(model.stitch_layers[0][0].transform.weight)
    for other in weights[1:]:
        torch.testing.assert_close(other, weights[0])


def test_init_leaves_anchors_and_training_flags_alone(
    make_vit: Callable[..., PlainViT],
) -> None:
    model = StitchedViT(make_vit(drop_path_rate=0.5), make_vit(drop_path_rate=0.5)).train()
    model.small.blocks[0].eval()
    flags = [module.training for module in model.modules()]
    anchors = copy.deepcopy(model.anchors.state_dict())
    images = torch.randn(16, 3, 8, 8)
    model.init_stitches(images)
    assert [module.training for module in model.modules()] == flags
    for name, value in model.anchors.state_dict().items():
        assert torch.equal(value, anchors[name])
    # Stochastic depth was off: the same images give the same bits.
    first = copy.deepcopy(model.stitch_layers.state_dict())
    model.init_stitches(images)
    for name, value in model.stitch_layers.state_dict().items():
        assert torch.equal(value, first[name])
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (torch.zeros(0, 3, 8, 8), ValueError, "at least one image"),
        ([], ValueError, "at least one image"),
        (torch.full((2, 3, 8, 8), float("nan")), ValueError, "finite tokens"),
        (torch.zeros(2, 3, 8, 9), ValueError, r"\(batch, 3, 8, 8\), got \(2, 3, 8, 9\)"),
        ([{"image": 1}], TypeError, "got dict"),
        ([[1, 2]], TypeError, "got list"),
    ],
)
def test_bad_images_leave_the_stitches_as_they_were(
    make: Make, images: Any, error: type[Exception], message: str
) -> None:
    model = make().train()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(error, match=message):
        model.init_stitches(images)
    assert model.training
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


@pytest.mark.parametrize("size", [0, -1])
def test_init_needs_a_positive_batch_size(make: Make, size: int) -> None:
    with pytest.raises(ValueError, match=f"batch_size must be at least 1, got {size}"):
        make().init_stitches(torch.randn(4, 3, 8, 8), batch_size=size)


def tiny_pair() -> tuple[PlainViT, PlainViT]:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"num_classes": 5, "num_heads": 2, "init_values": 0.7}
    return (
        PlainViT(8, 4, embed_dim=8, depth=2, **sizes),
        PlainViT(8, 4, embed_dim=16, depth=3, **sizes),
    )


def init_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    anchors = tiny_pair()
    torch.manual_seed(rank)  # A of the stitches starts differently on each rank
    model = StitchedViT(*anchors, rank=2)
    images = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    model.init_stitches(images[:7] if rank == 0 else images[7:])
    draws = [model.sampler.draw() for _ in range(20)]
    torch.save((model.stitch_layers.state_dict(), draws), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_data_parallel_ranks_end_with_the_same_bits(tmp_path: Path) -> None:
    mp.spawn(init_on_rank, (str(tmp_path),), nprocs=2)
    (first, first_draws), (second, second_draws) = (
        torch.load(tmp_path / f"{rank}.pt") for rank in range(2)
    )
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert torch.equal(value, second[name])
    # The maps fit the images of both ranks together.
    single = StitchedViT(*tiny_pair(), rank=2)
    images = torch.randn(10, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    single.init_stitches(images)
    for name, value in single.stitch_layers.state_dict().items():
        if "lora_A" not in name:
            torch.testing.assert_close(first[name], value, rtol=1e-4, atol=1e-5)
    assert first_draws != second_draws
