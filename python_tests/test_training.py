import math
from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snkernels import PlainViT, StitchedViT
from snkernels.routing.space import LARGE
from snkernels.training import distillation_loss, training_loss

IMAGES, LABELS = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(5)), [0, 4, 2, 1]


def make(seed: int = 4) -> StitchedViT:
    torch.manual_seed(0)
    anchors = (
        PlainViT(8, 4, 3, 5, embed_dim=width, depth=3, num_heads=3, init_values=1.0)
        for width in (12, 24)
    )
    model = StitchedViT(*anchors, 2, seed=seed).train()
    for layers in model.stitch_layers:
        for layer in layers:
            nn.init.normal_(layer.transform.lora_B)
    return model


def grads(model: nn.Module) -> dict[str, Tensor | None]:
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("distillation", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("soft", [False, True])
def test_gradients_are_the_mean_of_what_each_route_alone_gives(
    distillation: float, soft: bool
) -> None:
    labels = torch.tensor(LABELS)
    if soft:
        labels = F.one_hot(labels, 5) * 0.8 + 0.04
    model, twin = make(), make()
    step = training_loss(
        model, IMAGES, labels, routes_per_step=5, distillation=distillation, temperature=2.0
    )
    step.loss.backward()

    assert step.routes == twin.draw(5)
    with torch.no_grad():
        teacher = twin(IMAGES, stitch=LARGE)
    losses = []
    for route, logits in zip(step.routes, step.logits, strict=True):
        alone = twin(IMAGES, stitch=route)
        torch.testing.assert_close(logits, alone, rtol=1e-5, atol=1e-5)
        loss = (1 - distillation) * F.cross_entropy(alone, labels)
        loss = loss + distillation * distillation_loss(alone, teacher, 2.0)
        (loss / 5).backward()
        losses.append(loss.detach())
    torch.testing.assert_close(step.loss.detach(), torch.stack(losses).mean())
    ours, theirs = grads(model), grads(twin)
    # Parameters that no drawn route uses have no gradient at all, not even those of the teacher.
    for name, grad in theirs.items():
        if grad is None:
            assert ours[name] is None, name
        else:
            torch.testing.assert_close(ours[name], grad, rtol=1e-5, atol=1e-5, msg=name)


def test_a_teacher_that_was_not_drawn_gets_no_gradients() -> None:
    seed = next(s for s in range(20) if make(s).draw(1) == [0])
    model = make(seed)
    training_loss(model, IMAGES, torch.tensor(LABELS), distillation=0.5).loss.backward()
    assert all(p.grad is None for p in model.large.parameters())
    assert all(p.grad is not None for p in model.small.parameters())


def test_a_teacher_shares_what_a_route_begins_with_and_goes_on_without_gradients() -> None:
    drawn = ((seed, make(seed).space.route(make(seed).draw(1)[0])) for seed in range(100))
    seed, route = next((s, r) for s, r in drawn if len(r.segments) == 2 and r.segments[0].anchor)
    model = make(seed)
    seen: dict[int, list[tuple[int, bool]]] = {}
    for i, block in enumerate(model.large.blocks):
        block.mlp.register_forward_hook(
            lambda _, args, out, i=i: seen.setdefault(i, []).append((len(out), out.requires_grad))
        )
    training_loss(model, IMAGES, torch.tensor(LABELS), distillation=0.5).loss.backward()
    assert seen == {i: [(len(IMAGES), i < route.segments[0].stop)] for i in range(3)}


def test_a_teacher_under_autocast_costs_no_weight_its_gradient() -> None:
    """Autocast keeps what it cast, and what it cast without gradients has none."""
    model, twin = make(), make()
    with torch.autocast("cpu", torch.bfloat16):
        step = training_loss(
            model, IMAGES, torch.tensor(LABELS), routes_per_step=5, distillation=0.5
        )
        twin(IMAGES, routes=twin.draw(5)).float().logsumexp(-1).sum().backward()
    step.loss.backward()
    ours, theirs = grads(model), grads(twin)
    assert {n for n, g in ours.items() if g is None} == {n for n, g in theirs.items() if g is None}


def test_a_step_runs_what_its_routes_begin_with_once() -> None:
    model = make()
    rows: Counter[str] = Counter()
    for name, module in model.named_modules():
        if name.endswith("mlp"):
            module.register_forward_hook(lambda _, args, out, n=name: rows.update({n: len(out)}))
    step = training_loss(model, IMAGES, torch.tensor(LABELS), routes_per_step=40)
    assert set(step.routes) == {route.id for route in model.routes}
    # In each anchor's blocks 0, 1 and 2 there are 1, 2 and 4 ways to be.
    assert rows == {name: 4 * 2 ** int(name.split(".")[3]) for name in rows}


def test_steps_draw_what_single_draws_would() -> None:
    model, twin = make(), make()
    labels = torch.tensor(LABELS)
    for k in (1, 3, 2):
        assert training_loss(model, IMAGES, labels, routes_per_step=k).routes == twin.draw(k)


class Wrapper(nn.DataParallel):
    """Wraps as DistributedDataParallel does, and sees every forward."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.calls = 0

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self.module(*args, **kwargs)


def test_the_forward_goes_through_a_data_parallel_wrapper() -> None:
    wrapper = Wrapper(make())
    step = training_loss(wrapper, IMAGES, torch.tensor(LABELS), routes_per_step=2)
    assert wrapper.calls == 1
    assert step.routes == make().draw(2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"routes_per_step": 0}, ValueError, "routes_per_step must be at least 1, got 0"),
        ({"distillation": 1.5}, ValueError, r"distillation must be in \[0, 1\], got 1.5"),
        ({"distillation": math.nan}, ValueError, r"distillation must be in \[0, 1\], got nan"),
        ({"temperature": 0.0}, ValueError, "temperature must be positive, got 0.0"),
        ({"labels": torch.zeros(3).long()}, ValueError, "got 3 for 4 images"),
        ({"labels": torch.zeros(4, 7)}, RuntimeError, "target"),
        ({"images": torch.full((4, 3, 8, 8), math.nan)}, ValueError, "images must be finite"),
        ({"model": nn.Linear(2, 2)}, TypeError, "model must be a StitchedViT, .* got Linear"),
    ],
)
def test_bad_steps_are_named_and_draw_nothing(
    changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = make()
    before = model.sampler.state_dict()
    arguments = {"model": model, "images": IMAGES, "labels": torch.tensor(LABELS)} | changes
    with pytest.raises(error, match=message):
        training_loss(**arguments)
    assert model.sampler.state_dict() == before


def test_two_classes_by_hand() -> None:
    # Odds of 3:1 against 1:1 and 1:3: KL = ln 2 - H(1/4), and ln 3 / 2.
    teacher = torch.tensor([[math.log(3.0), 0.0]])
    logits = torch.tensor([[[0.0, 0.0]], [[0.0, math.log(3.0)]], [[math.log(3.0), 0.0]]])
    entropy = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    expected = (math.log(2) - entropy, math.log(3) / 2, 0.0)
    for route, value in zip(logits, expected, strict=True):
        assert distillation_loss(route, teacher).item() == pytest.approx(value, abs=1e-6)
    assert distillation_loss(logits, teacher).item() == pytest.approx(sum(expected) / 3)


def test_temperature() -> None:
    logits, teacher = torch.randn(2, 3, 5), torch.randn(3, 5)
    soft = distillation_loss(logits, teacher, 4.0)
    torch.testing.assert_close(soft, 16 * distillation_loss(logits / 4, teacher / 4))


def test_routes_learn_and_the_teacher_does_not() -> None:
    logits = torch.randn(2, 3, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    loss = distillation_loss(logits, teacher)
    loss.backward()
    assert teacher.grad is None
    # d KL / d logits is the difference of the probabilities.
    expected = (logits.softmax(-1) - teacher.softmax(-1)) / 6
    torch.testing.assert_close(logits.grad, expected.detach())


def test_half_precision_is_computed_in_single() -> None:
    logits, teacher = torch.randn(2, 3, 5).half(), torch.randn(3, 5).half()
    loss = distillation_loss(logits, teacher)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, distillation_loss(logits.float(), teacher.float()))


def test_bad_input_is_named() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\) and \(2, 5\)"):
        distillation_loss(torch.zeros(2, 3, 5), torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"got \(2, 3, 5\) and \(2, 3, 5\)"):
        distillation_loss(torch.zeros(2, 3, 5), torch.zeros(2, 3, 5))
    for temperature in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="temperature must be positive"):
            distillation_loss(torch.zeros(3, 5), torch.zeros(3, 5), temperature)
