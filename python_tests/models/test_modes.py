from collections.abc import Callable

import pytest
import torch
from torch import nn

from snkernels import StitchedViT, evaluate, profile, warmup
from snkernels.models.modes import eval_mode, inference, no_grad

Use = Callable[[StitchedViT], object]

IMAGES, LABELS = torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
USES: dict[str, Use] = {
    "evaluate": lambda model: evaluate(model, [(IMAGES, LABELS)], progress=False),
    "profile": lambda model: profile(model, 1, rounds=1, seconds=0.0, progress=False),
    "warmup": lambda model: warmup(model, 1, progress=False),
    "warmup for training": lambda model: warmup(model, 1, training=True, progress=False),
    "init_stitches": lambda model: model.init_stitches(IMAGES, progress=False),
}


@pytest.mark.parametrize("name", USES)
def test_may_be_used_inside_the_autocast_of_training(
    name: str, make: Callable[..., StitchedViT]
) -> None:
    model = make()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(IMAGES, routes="all").sum().backward()
        named = model.named_parameters()
        return {name: p.grad.clone() for name, p in named if p.grad is not None}

    with torch.autocast("cpu", torch.bfloat16):
        USES[name](model)  # which may give the stitches their weights
    with torch.autocast("cpu", torch.bfloat16):
        expected = gradients()
    with torch.autocast("cpu", torch.bfloat16):
        USES[name](model)
        torch.testing.assert_close(gradients(), expected)


def test_modes_of_all_modules_are_restored() -> None:
    module = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout()))
    module[1].eval()
    modes = [child.training for child in module.modules()]
    with pytest.raises(KeyError), eval_mode(module):
        assert not any(child.training for child in module.modules())
        raise KeyError
    assert [child.training for child in module.modules()] == modes


def test_inference_keeps_autocast_without_its_cache() -> None:
    linear, x = nn.Linear(3, 3), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with inference(linear, "cpu"):
            assert torch.is_inference_mode_enabled()
            assert not torch.is_autocast_cache_enabled()
            assert linear(x).dtype is torch.bfloat16
        assert torch.is_autocast_cache_enabled()
        linear(x).sum().backward()
    assert linear.weight.grad is not None


def test_without_gradients_between_those_with() -> None:
    linear, x = nn.Linear(3, 3), torch.randn(2, 3)
    with torch.autocast("cpu", torch.bfloat16):
        with no_grad("cpu"):
            assert not linear(x).requires_grad
        linear(x).sum().backward()
    assert linear.weight.grad is not None
