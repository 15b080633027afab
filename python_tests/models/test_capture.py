from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from snkernels.models import capture
from snkernels.models.capture import CapturedForward
from snkernels.models.stitched import StitchedViT

Make = Callable[..., StitchedViT]

ARGUMENTS: list[dict[str, Any]] = [
    {},
    {"stitch": 2},
    {"stitch": [4, 0, 2]},
    {"routes": [4, 1]},
    {"routes": "all"},
]


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand in for a graph: a replay runs the call and writes into the output of the first."""

    def record(call: Callable[[], Tensor], model: nn.Module) -> tuple[Callable[[], None], Tensor]:
        logits = call()

        def replay() -> None:
            logits.copy_(call())

        return replay, logits

    monkeypatch.setattr(capture, "_record", record)


@pytest.mark.parametrize("arguments", ARGUMENTS, ids=str)
def test_a_replay_is_the_forward(make: Make, stand_in: None, arguments: dict[str, Any]) -> None:
    model = make()
    replay = CapturedForward(model, torch.zeros(3, 3, 8, 8), arguments)
    images = torch.randn(2, 3, 3, 8, 8)
    logits = [replay(batch) for batch in images]
    for batch, actual in zip(images, logits, strict=True):  # the second replay leaves the first be
        with torch.no_grad():
            torch.testing.assert_close(actual, model(batch, **arguments))


def test_parameters_written_in_place_are_seen_and_moved_ones_detected(
    make: Make, stand_in: None
) -> None:
    model, other = make(), make()
    images = torch.randn(3, 3, 8, 8)
    replay = CapturedForward(model, torch.zeros_like(images), {"stitch": 2})
    model.load_state_dict(other.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(replay(images), other(images, stitch=2))
    with pytest.raises(ValueError, match=r"shape \(3, 3, 8, 8\), as captured, got \(2, 3, 8, 8\)"):
        replay(images[:2])
    model.load_state_dict(other.state_dict(), assign=True)
    with pytest.raises(RuntimeError, match=r"anchors\.0\.cls_token was moved"):
        replay(images)


def test_what_cannot_be_captured_is_named(make: Make) -> None:
    with pytest.raises(RuntimeError, match="needs CUDA graphs, and the model is on device 'cpu'"):
        make().capture(2, stitch=1)
    with pytest.raises(RuntimeError, match="must be in eval mode"):
        make().train().capture(2)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make().capture(0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: CUDA graphs are replayed")
def test_graphs_of_several_routes_on_a_gpu(make: Make) -> None:
    model = make().cuda()
    images = torch.randn(3, 3, 8, 8, device="cuda")
    graphs = [(arguments, model.capture(3, **arguments)) for arguments in ARGUMENTS]
    for _ in range(2):
        for arguments, replay in reversed(graphs):
            with torch.no_grad():
                expected = model(images, **arguments)
            torch.testing.assert_close(replay(images), expected)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(0.9)
    del graphs, replay
    for _ in range(2):  # what graphs share serves on when all of them are gone
        replay = model.capture(3, stitch=2)
        with torch.no_grad():
            torch.testing.assert_close(replay(images), model(images, stitch=2))
        del replay
    replay = model.capture(3, stitch=2)
    model.cpu()
    with pytest.raises(RuntimeError, match="was moved"):
        replay(images)
