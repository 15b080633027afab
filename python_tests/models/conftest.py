import sys
from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snkernels.models.anchors import embed
from snkernels.models.stitched import StitchedViT
from snkernels.models.vit import PlainViT

_kept_alive: list[torch.library.Library] = []


@pytest.fixture
def randomise() -> Callable[[nn.Module], None]:
    """Fill all parameters so that each matters: first values such as gamma = 1e-4 hide faults."""

    def fill(module: nn.Module) -> None:
        with torch.no_grad():
            for name, parameter in module.named_parameters():
                if parameter.ndim > 1:
                    fan_in = parameter[0].numel()
                    nn.init.normal_(parameter, std=fan_in**-0.5)
                elif name.endswith(("gamma", "weight")):
                    nn.init.uniform_(parameter, 0.5, 1.5)
                else:
                    nn.init.normal_(parameter, std=0.5)

    return fill


@pytest.fixture
def make_vit(randomise: Callable[[nn.Module], None]) -> Callable[..., PlainViT]:
    """Build a tiny PlainViT in eval mode with random parameters."""

    def build(**changes: Any) -> PlainViT:
        arguments = {
            "img_size": 8,
            "patch_size": 4,
            "num_classes": 5,
            "embed_dim": 12,
            "depth": 2,
            "num_heads": 3,
        }
        vit = PlainViT(**{**arguments, **changes})
        randomise(vit)
        return vit.eval()

    return build


@pytest.fixture
def make(
    make_vit: Callable[..., PlainViT], randomise: Callable[[nn.Module], None]
) -> Callable[..., StitchedViT]:
    """Build a stitched pair of tiny anchors in eval mode with random parameters."""

    def build(depths: tuple[int, int] = (2, 4), rank: int = 3, **options: Any) -> StitchedViT:
        small, large = make_vit(depth=depths[0]), make_vit(depth=depths[1], embed_dim=24)
        model = StitchedViT(small, large, rank, **options).eval()
        randomise(model)
        return model

    return build


@pytest.fixture(scope="session")
def run_by_hand() -> Callable[..., Tensor]:
    """Run (anchor, block) after (anchor, block) of a stitched model, with plain torch alone."""

    def run(model: StitchedViT, blocks: list[tuple[int, int]], images: Tensor) -> Tensor:
        anchor = blocks[0][0]
        tokens = embed(model.anchors[anchor], images)
        for (anchor, block), (next_anchor, next_block) in pairwise([*blocks, (blocks[-1][0], -1)]):
            tokens = model.anchors[anchor].blocks[block](tokens)
            if next_anchor != anchor:
                cut = model.space.cuts.index(
                    (block + 1, next_block) if anchor == 0 else (next_block, block + 1)
                )
                t = model.stitch_layers[anchor][cut].transform
                weight = t.weight + t.lora_B @ t.lora_A / t.lora_A.shape[0]
                tokens = F.linear(tokens, weight, t.bias)
        vit = model.anchors[anchor]
        return vit.head(vit.norm(tokens)[:, 0])

    return run


@pytest.fixture(scope="session")
def timm() -> ModuleType:
    """Import timm, which needs torchvision, whose compiled part may be for another torch."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        pytest.skip("torchvision is not installed, and timm needs it")
    except RuntimeError:
        # Its operators are registered in Python for shape inference even where they are not
        # compiled; timm uses neither.
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        library = torch.library.Library("torchvision", "DEF")
        _kept_alive.append(library)
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return pytest.importorskip("timm")
