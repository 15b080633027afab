"""Any mixture of routes in one pass is each route alone."""

import random
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from judge import assert_as_exact_as_torch
from torch import Tensor, nn

from snkernels.backends import use_backend
from snkernels.kernels import native
from snkernels.layers import StitchingLayer
from snkernels.models.stitched import StitchedViT
from snkernels.routing.space import Route

Make = Callable[..., StitchedViT]
ByHand = Callable[..., Tensor]

needs_kernel = pytest.mark.skipif(native.IMPORT_ERROR is not None, reason="_C is not built")
BACKENDS = ["torch", pytest.param("cpu", marks=needs_kernel)]


def blocks_of(route: Route) -> list[tuple[int, int]]:
    return [(s.anchor, block) for s in route.segments for block in range(s.start, s.stop)]


def alone(by_hand: ByHand, model: StitchedViT, images: Tensor, ids: Sequence[int]) -> Tensor:
    """Return logits (routes, batch, classes) of each route by itself, block after block."""
    return torch.stack([by_hand(model, blocks_of(model.space.route(i)), images) for i in ids])


def ids_of(model: StitchedViT) -> list[int]:
    return [route.id for route in model.routes]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("depths", [(1, 1), (2, 4), (3, 3), (3, 5), (5, 3)])
def test_the_whole_space_in_one_pass(
    make: Make, run_by_hand: ByHand, depths: tuple[int, int], backend: str
) -> None:
    model = make(depths)
    images = torch.randn(3, 3, 8, 8)
    expected = alone(run_by_hand, model, images, ids_of(model))
    for max_rows in (None, 3, 4, 7, 20):
        with use_backend(backend), torch.no_grad():
            actual = model(images, routes="all", max_rows=max_rows)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("seed", range(4))
def test_a_route_for_each_sample(
    make: Make, run_by_hand: ByHand, seed: int, training: bool, backend: str
) -> None:
    rng = random.Random(seed)
    model = make((rng.randint(1, 5), rng.randint(1, 5))).train(training)
    images = torch.randn(7, 3, 8, 8)
    ids = [rng.choice(ids_of(model)) for _ in range(7)]
    expected = torch.cat(
        [alone(run_by_hand, model, images[i : i + 1], [ids[i]])[0] for i in range(7)]
    )
    for stitch in (ids, torch.tensor(ids)):
        with use_backend(backend):
            actual = model(images, stitch=stitch, max_rows=rng.choice([None, 4]))
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("max_rows", [None, 5])
def test_some_routes_in_any_order_and_twice(
    make: Make, run_by_hand: ByHand, max_rows: int | None
) -> None:
    model = make((4, 4))
    images = torch.randn(3, 3, 8, 8)
    ids = [7, 0, 13, 7, 2, 1]
    actual = model(images, routes=ids, max_rows=max_rows)
    expected = alone(run_by_hand, model, images, ids)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(actual[0], actual[3])


def gradients(model: StitchedViT, logits: Tensor) -> dict[str, Tensor | None]:
    names, parameters = zip(
        *((name, p) for name, p in model.named_parameters() if p.requires_grad), strict=True
    )
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    grads = torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("depths", [(2, 4), (4, 3)])
@pytest.mark.parametrize("max_rows", [None, 5])
def test_gradients_of_many_routes(
    make: Make, run_by_hand: ByHand, depths: tuple[int, int], max_rows: int | None
) -> None:
    model = make(depths).double().train()
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    ids = ids_of(model)[2:]  # some parameters are left out
    actual = gradients(model, model(images, routes=ids, max_rows=max_rows))
    for name, grad in gradients(model, alone(run_by_hand, model, images, ids)).items():
        torch.testing.assert_close(actual[name], grad, msg=name)


@pytest.mark.parametrize("ways", ["a route for each sample", "many routes"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_are_as_exact_as_those_of_each_route_alone(
    make: Make, run_by_hand: ByHand, dtype: torch.dtype, ways: str
) -> None:
    model = make((3, 5)).train().to(dtype)
    images = torch.randn(4, 3, 8, 8).to(dtype)
    ids = [0, 3, 6, 7]

    def one_by_one(images: Tensor) -> Tensor:
        if ways == "many routes":
            return alone(run_by_hand, model, images, ids)
        rows = [alone(run_by_hand, model, images[i : i + 1], [ids[i]])[0] for i in range(4)]
        return torch.cat(rows)

    together = {"routes": ids} if ways == "many routes" else {"stitch": ids}
    actual = gradients(model, model(images, **together))
    eager = gradients(model, one_by_one(images))
    model.double()
    exact = gradients(model, one_by_one(images.double()))
    present = [name for name, grad in exact.items() if grad is not None]
    assert present == [name for name, grad in actual.items() if grad is not None]

    def joined(grads: dict[str, Tensor]) -> Tensor:
        """All of them, each by its size: in a vector of twelve, errors are a matter of luck."""
        return torch.cat([(grads[n] / exact[n].square().mean().sqrt()).flatten() for n in present])

    assert_as_exact_as_torch("gradients", joined(actual), joined(eager), joined(exact))
    if dtype is torch.float32:
        for name in present:
            off = (actual[name] - eager[name]).abs().max()
            assert off <= 1e-5 * eager[name].abs().max(), name


@pytest.mark.parametrize("backend", BACKENDS)
def test_half_precision_is_as_exact_as_each_route_alone(
    make: Make, run_by_hand: ByHand, backend: str
) -> None:
    model = make((3, 5))
    images = torch.randn(4, 3, 8, 8).bfloat16()
    model.bfloat16()
    eager = alone(run_by_hand, model, images, ids_of(model))
    with use_backend(backend):
        actual = model(images, routes="all")
        mixed = model(images, stitch=[0, 3, 6, 8])
    model.double()
    exact = alone(run_by_hand, model, images.double(), ids_of(model))
    assert_as_exact_as_torch("all routes", actual, eager, exact)
    at = [ids_of(model).index(i) for i in (0, 3, 6, 8)], range(4)
    assert_as_exact_as_torch("mixed batch", mixed, eager[at], exact[at])


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast(make: Make, run_by_hand: ByHand, backend: str) -> None:
    """Rows that have crossed a stitch are half there, those that have not are not."""
    model = make((3, 5))
    images = torch.randn(4, 3, 8, 8)
    exact = alone(run_by_hand, model.double(), images.double(), ids_of(model))
    model.float()
    with torch.autocast("cpu", torch.bfloat16), use_backend(backend):
        eager = alone(run_by_hand, model, images, ids_of(model))
        actual = model(images, routes="all")
    assert actual.dtype == eager.dtype == torch.bfloat16
    assert_as_exact_as_torch("all routes", actual, eager, exact)


def rows_through(model: StitchedViT) -> list[int]:
    """Record the rows of every call of an MLP."""
    seen: list[int] = []
    for vit in model.anchors:
        for block in vit.blocks:
            block.mlp.register_forward_hook(lambda *call: seen.append(len(call[2])))
    return seen


def test_equal_prefixes_run_once_and_within_the_limit(make: Make) -> None:
    model = make((3, 3))
    images = torch.randn(4, 3, 8, 8)
    rows = rows_through(model)
    model(images, routes="all")
    # Ways to be in each block of one image's trie: S L | SS SL LS LL | SSS SSL SLL SLS and back.
    assert Counter(rows) == {4: 2, 8: 2, 16: 2}
    for max_rows in (3, 8, 13):
        rows.clear()
        model(images, routes="all", max_rows=max_rows)
        assert max(rows) <= max_rows
        assert sum(rows) == 4 * (2 + 4 + 8)


def test_rows_that_are_gathered_are_normalised_once(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make((3, 3))
    normed: list[int] = []
    fused, apart = StitchingLayer.forward_norm, nn.LayerNorm.forward

    def forward_norm(layer: StitchingLayer, x: Tensor, norm: nn.LayerNorm) -> Any:
        normed.append(len(x))
        return fused(layer, x, norm)

    def forward(norm: nn.LayerNorm, x: Tensor) -> Tensor:
        normed.append(len(x))
        return apart(norm, x)

    monkeypatch.setattr(StitchingLayer, "forward_norm", forward_norm)
    monkeypatch.setattr(nn.LayerNorm, "forward", forward)
    with use_backend("torch"):  # which has no norm in the residual pass
        model(torch.randn(4, 3, 8, 8), routes="all")
    # Two norms in each block of each image's trie, and the last one of each route.
    assert sum(normed) == 4 * (2 * (2 + 4 + 8) + 8)


def test_a_single_route_is_the_loop_over_its_blocks(make: Make) -> None:
    model = make((2, 4))
    rows = rows_through(model)
    model(torch.randn(300, 3, 8, 8), stitch=2)
    assert rows == [300] * 3


def test_inference_on_a_cpu_goes_through_blocks_in_slices(make: Make, run_by_hand: ByHand) -> None:
    model = make((2, 4))
    images = torch.randn(11, 3, 8, 8)
    rows = rows_through(model)
    with torch.no_grad():
        model(images, stitch=2)
        assert rows == [6, 5, 6, 6, 5, 5]  # block 0 of S, then blocks 2 and 3 of L
        actual = model(images, routes="all")
    assert max(rows) <= 10
    torch.testing.assert_close(
        actual, alone(run_by_hand, model, images, ids_of(model)), rtol=1e-5, atol=1e-5
    )


def test_training_with_stochastic_depth(
    make_vit: Callable[..., Any], randomise: Callable[[nn.Module], None], run_by_hand: ByHand
) -> None:
    rates = {"drop_path_rate": 0.5, "depth": 4}
    model = StitchedViT(make_vit(**rates), make_vit(embed_dim=24, **rates), 2).double()
    randomise(model)
    model.train()
    images = torch.randn(5, 3, 8, 8, dtype=torch.float64)
    for route in model.routes:
        torch.manual_seed(route.id)
        expected = run_by_hand(model, blocks_of(route), images)
        torch.manual_seed(route.id)
        torch.testing.assert_close(model(images, stitch=route.id), expected)
    logits = model(images, routes="all")
    assert logits.isfinite().all()
    torch.manual_seed(0)
    drawn = model(images, routes=[0, 1])
    assert not torch.equal(drawn, model(images, routes=[0, 1]))


def test_routes_of_a_step_are_drawn_as_steps_draw_them(make: Make) -> None:
    model, twin = make((3, 3), seed=4).train(), make((3, 3), seed=4)
    assert [*model.draw(3), *model.draw(5)] == [twin.sampler.draw() for _ in range(8)]
    with pytest.raises(ValueError, match="count must be at least 1, got 0"):
        model.draw(0)


def test_the_mean_loss_of_several_routes_is_the_mean_of_their_losses(
    make: Make, run_by_hand: ByHand
) -> None:
    model = make((3, 3), seed=4).double().train()
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    labels = torch.tensor([0, 4, 2, 1])
    ids = [1, *model.draw(3), 1]  # a route that comes twice counts twice
    losses = []
    for i in ids:
        logits = run_by_hand(model, blocks_of(model.space.route(i)), images)
        losses.append(F.cross_entropy(logits, labels))
    expected = gradients(model, torch.stack(losses).mean())
    logits = model(images, routes=ids)
    loss = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(ids)))
    torch.testing.assert_close(loss, torch.stack(losses).mean())
    actual = gradients(model, loss)
    for name, grad in expected.items():
        torch.testing.assert_close(actual[name], grad, msg=name)


@pytest.mark.parametrize("kind", [np.int64, np.array, torch.tensor])
def test_integers_of_every_kind_are_ids_and_numbers(make: Make, kind: Callable[..., Any]) -> None:
    model, images = make().eval(), torch.randn(2, 3, 8, 8)
    for given, plain in (
        ({"stitch": kind(2), "max_rows": kind(4)}, {"stitch": 2}),
        ({"stitch": [kind(4), kind(2)]}, {"stitch": [4, 2]}),
        ({"stitch": torch.tensor([4, 2])}, {"stitch": [4, 2]}),
        ({"routes": np.array([4, 2])}, {"routes": [4, 2]}),
    ):
        assert torch.equal(model(images, **given), model(images, **plain))
    model.default_route = kind(0)
    model(images)
    assert model.last_route == 0
    assert len(model.draw(kind(3))) == 3
    model.scores = {4: 1.0}
    assert model.select(0.9, kind(1)).route.id == 4
    model.init_stitches(images, batch_size=kind(1))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"stitch": 3}, ValueError, r"must be in 0–2 or 4–4, got 3"),
        ({"stitch": 2.0}, TypeError, "route id must be an integer, got 2.0, a float"),
        ({"stitch": "2"}, TypeError, "route id must be an integer, got '2', a str"),
        ({"stitch": [0, 5]}, ValueError, r"must be in 0–2 or 4–4, got 5"),
        ({"stitch": [0]}, ValueError, "one route id for each of the 2 images, got 1"),
        ({"stitch": [0, 1, 2]}, ValueError, "one route id for each of the 2 images, got 3"),
        ({"stitch": []}, ValueError, "one route id for each of the 2 images, got 0"),
        ({"stitch": [0, None]}, TypeError, "route id must be an integer, got None, a NoneType"),
        ({"routes": []}, ValueError, "routes must name at least one route, got none"),
        ({"routes": [0, -1]}, ValueError, r"must be in 0–2 or 4–4, got -1"),
        ({"routes": ["S"]}, TypeError, "route id must be an integer, got 'S', a str"),
        ({"routes": "every"}, ValueError, """routes must be "all" or route ids, got 'every'"""),
        ({"routes": [0], "stitch": 0}, ValueError, "only one of stitch, routes and budget"),
        ({"max_rows": 2}, ValueError, "max_rows must be at least 3, got 2"),
        ({"routes": "all", "max_rows": 0}, ValueError, "max_rows must be at least 3, got 0"),
        ({"images": torch.zeros(0, 3, 8, 8)}, ValueError, "at least one image, got none"),
        ({"images": torch.zeros(2, 3, 8, 9)}, ValueError, r"must have shape \(batch, 3, 8, 8\)"),
        ({"images": torch.full((2, 3, 8, 8), torch.nan)}, ValueError, "images must be finite"),
        ({"images": torch.full((2, 3, 8, 8), torch.inf)}, ValueError, "images must be finite"),
    ],
)
def test_bad_input_is_named_and_changes_nothing(
    make: Make, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make().train()
    model(torch.randn(1, 3, 8, 8), stitch=4)
    before = model.sampler.state_dict(), torch.get_rng_state()
    with pytest.raises(error, match=message):
        model(**{"images": torch.randn(2, 3, 8, 8, generator=torch.Generator())} | arguments)
    assert model.sampler.state_dict() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert model.last_route == 4


def test_the_last_route_is_told_where_there_is_one(make: Make) -> None:
    model = make()
    images = torch.randn(2, 3, 8, 8)
    for arguments, last in (
        ({}, 1),
        ({"stitch": [2, 2]}, 2),
        ({"stitch": [2, 0]}, None),
        ({"routes": [4]}, 4),
        ({"routes": "all"}, None),
    ):
        model(images, **arguments)
        assert model.last_route == last
