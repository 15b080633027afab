"""The model on a GPU, on every backend, in widths that all kernels take. Needs a GPU."""

from collections.abc import Callable

import pytest
import torch
from device import DEVICE
from judge import assert_as_exact_as_torch
from torch import Tensor, nn

from snkernels.backends import use_backend
from snkernels.models.stitched import StitchedViT
from snkernels.models.vit import PlainViT

if DEVICE == "cpu":
    pytest.skip("needs a GPU: SNKERNELS_TEST_DEVICE=cuda", allow_module_level=True)

BACKENDS = ["triton", "cuda"]


@pytest.fixture
def model(make_vit: Callable[..., PlainViT], randomise: Callable[[nn.Module], None]) -> StitchedViT:
    small = make_vit(depth=3, embed_dim=128, num_heads=2)
    large = make_vit(depth=6, embed_dim=384, num_heads=6)
    model = StitchedViT(small, large, 16).eval()
    randomise(model)
    return model.to(DEVICE)


def in_turn(model: StitchedViT, images: Tensor, call: Callable[[Tensor], Tensor], backend: str):
    """What a backend and torch make of the images, and the truth."""
    with use_backend(backend):
        actual = call(images)
    with use_backend("torch"):
        eager = call(images)
        model.double()
        exact = call(images.double())
    return actual, eager, exact


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_all_routes_and_a_mixed_batch(model: StitchedViT, backend: str, dtype: torch.dtype) -> None:
    ids = [route.id for route in model.routes if route.id is not None]
    images = torch.randn(len(ids), 3, 8, 8, device=DEVICE).to(dtype)

    def call(images: Tensor) -> Tensor:
        return torch.cat([model(images, stitch=ids), model(images[:3], routes="all").flatten(0, 1)])

    model.to(dtype)
    assert_as_exact_as_torch("logits", *in_turn(model, images, call, backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_training_step_under_autocast(model: StitchedViT, backend: str) -> None:
    images = torch.randn(8, 3, 8, 8, device=DEVICE)
    model.train()

    def call(images: Tensor) -> Tensor:
        """The gradients that a step along a route of two switches leaves, in a row."""
        half = images.dtype == torch.float32
        with torch.autocast(DEVICE, torch.bfloat16, enabled=half):
            logits = model(images, stitch=model.routes[-1].id)
        loss = logits.to(images.dtype).square().mean()
        used = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, used, allow_unused=True)
        return torch.cat([grad.flatten() for grad in grads if grad is not None])

    assert_as_exact_as_torch("gradients", *in_turn(model, images, call, backend))
