from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from snkernels.models.stitched import StitchedViT
from snkernels.models.vit import PlainViT


@pytest.mark.parametrize("training", [False, True])
def test_no_route_compiles_anew(
    make_vit: Callable[..., PlainViT], randomise: Callable[[nn.Module], None], training: bool
) -> None:
    rate = {"drop_path_rate": 0.3}
    model = StitchedViT(make_vit(depth=2, **rate), make_vit(depth=4, embed_dim=24, **rate), 2)
    randomise(model)
    model.train(training)
    images = torch.randn(20, 3, 8, 8)
    ids = [route.id for route in model.routes]

    def run(images: torch.Tensor) -> list[torch.Tensor]:
        torch.manual_seed(0)
        with torch.set_grad_enabled(training):
            return [model(images, stitch=i) for i in ids] + [model(images, routes="all")]

    expected = run(images)
    torch.compiler.reset()
    counter = CompileCounter()
    model.compile_blocks(backend=counter)
    with torch.set_grad_enabled(training):
        model(images, stitch=0)
        model(images, stitch=1)
        # For each width: attention, the MLP of all tokens, the last MLP of the class token alone.
        assert counter.frame_count == 6
        for actual, want in zip(run(images), expected, strict=True):
            torch.testing.assert_close(actual, want, rtol=1e-5, atol=1e-5)
        run(images[:17])
        model(images, stitch=[ids[i % 2] for i in range(20)])
    assert counter.frame_count == 6
    torch.compiler.reset()
