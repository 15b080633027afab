"""The profile by a clock that every part of the model moves on by a time of its own."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import snkernels
from snkernels import profiling
from snkernels.models.setting import setting_of
from snkernels.models.stitched import StitchedViT
from snkernels.models.vit import PlainViT
from snkernels.routing.latency import Profile

EMBED, BLOCK, SWITCH, HEAD = 3.0, 16.0, 256.0, 5.0


def pair(depths: tuple[int, int] = (3, 5), rank: int = 2, **options: Any) -> StitchedViT:
    small, large = (
        PlainViT(8, 4, num_classes=5, embed_dim=width, depth=depth, num_heads=2, **options)
        for width, depth in zip((8, 12), depths, strict=True)
    )
    return StitchedViT(small, large, rank).eval()


@pytest.fixture
def ticking(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[StitchedViT], StitchedViT]]:
    """Let a model's parts move the clock: per image, and 7 times as much in the large anchor."""
    now = 0.0
    monkeypatch.setattr(profiling.time, "perf_counter", lambda: now)

    def add(module: torch.nn.Module, name: str, seconds: float) -> None:
        call = getattr(module, name)

        def slowly(x: torch.Tensor, *rest: Any) -> Any:
            nonlocal now
            now += seconds * len(x)
            return call(x, *rest)

        monkeypatch.setattr(module, name, slowly)

    def wind(model: StitchedViT) -> StitchedViT:
        for anchor, factor in ((model.small, 1), (model.large, 7)):
            add(anchor.patch_embed, "forward", EMBED * factor)
            add(anchor.head, "forward", HEAD * factor)
            for block in anchor.blocks:
                add(block.mlp, "forward", BLOCK * factor)
        for layers, factor in zip(model.stitch_layers, (1, 7), strict=True):
            for layer in layers:
                add(layer, "forward", SWITCH * factor)
                add(layer, "forward_norm", SWITCH * factor)
        return model

    yield wind


@pytest.mark.parametrize("depths", [(3, 5), (2, 2), (4, 3), (1, 2)])
def test_parts_add_up_to_every_route(
    ticking: Callable[[StitchedViT], StitchedViT], depths: tuple[int, int]
) -> None:
    model = ticking(pair(depths))
    # Of 20 images some go through blocks after the others.
    profile = snkernels.profile(model, [2, 1, 20], check="all", rounds=2, seconds=0)
    assert list(profile.parts) == [1, 2, 20]
    assert [(c.batch_size, c.route) for c in profile.checks] == [
        (size, route.id) for size in (1, 2, 20) for route in model.routes
    ]
    factors = (1, 7)
    for route in model.routes:
        expected = EMBED * factors[route.segments[0].anchor]
        expected += HEAD * factors[route.segments[-1].anchor]
        expected += sum(BLOCK * (s.stop - s.start) * factors[s.anchor] for s in route.segments)
        expected += sum(SWITCH * factors[stitch.direction] for stitch in route.stitches)
        assert profile.seconds(route, 1) == expected
        assert profile.seconds(route, 2) == 2 * expected
        assert profile.seconds(route, 20) == 20 * expected
    assert all(check.predicted == check.measured for check in profile.checks)
    assert profile.error(1) == 0


def test_blocks_that_are_called_as_modules_count_as_well(
    ticking: Callable[[StitchedViT], StitchedViT],
) -> None:
    model = ticking(pair())
    for anchor in model.anchors:
        for block in anchor.blocks:
            block.register_forward_hook(lambda *_: None)
    assert snkernels.profile(model, [1], check="all", rounds=1, seconds=0).error(1) == 0


def test_a_slow_block_counts_and_a_slow_round_does_not(
    ticking: Callable[[StitchedViT], StitchedViT], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = ticking(pair((4, 4)))
    walk, walks = profiling._Samples._walk, 0

    def disturbed(self: Any, path: Any) -> Any:
        nonlocal walks
        walks += 1
        seconds = walk(self, path)
        if walks % 36 < 4:  # one time of nine that the parts are measured
            return {part: [100 * s for s in each] for part, each in seconds.items()}
        return seconds

    monkeypatch.setattr(profiling._Samples, "_walk", disturbed)
    assert snkernels.profile(model, [1], rounds=6, seconds=0).error(1) == 0
    slow = model.small.blocks[1].mlp
    call = slow.forward
    monkeypatch.setattr(slow, "forward", lambda x: call(x) + 0 * call(x))
    profile = snkernels.profile(model, [1], rounds=6, seconds=0, check=[0])
    # The walk through S has the slow one among its three blocks, the zigzags have it as an exit.
    assert profile.parts[1].block[0] == pytest.approx(BLOCK * 4 / 3)
    assert profile.error(1) == 0


def test_rounds_go_on_while_there_is_time(ticking: Callable[[StitchedViT], StitchedViT]) -> None:
    model = ticking(pair())
    images = 0

    def count(*_: Any) -> None:
        nonlocal images
        images += 1

    model.small.norm.register_forward_hook(count)
    counts = []
    for rounds, seconds in ((1, 0), (3, 0), (1, 8e4), (1, 16e4)):
        images = 0
        snkernels.profile(model, [1], rounds=rounds, seconds=seconds)
        counts.append(images)
    assert counts[0] < counts[1] < counts[2] < counts[3]


def test_it_says_where_and_what_it_measured(tmp_path: Path) -> None:
    model = pair()
    model.train()
    model.small.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    profile = snkernels.profile(model, (1, 3), rounds=1, seconds=0)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert model.sampler.state_dict()["draws"] == 0
    assert profile.setting == setting_of(model)
    assert profile.setting.dtype == "float32"
    assert profile.setting.threads == torch.get_num_threads()
    assert profile.setting.device
    assert all(check.measured > 0 for check in profile.checks)
    # Eight routes there are, and both anchors are among those that are checked.
    assert {0, 1} <= {check.route for check in profile.checks}
    profile.save(tmp_path / "profile.json")
    model.profile = Profile.load(tmp_path / "profile.json")
    text = str(profile)
    assert "batch 1" in text and "batch 3" in text and "switch S→L" in text


def test_elsewhere_a_copy_is_measured() -> None:
    model = pair()
    with torch.device("meta"):
        far = pair()
    profile = snkernels.profile(model, [1], "cpu", rounds=1, seconds=0)
    assert profile.setting == setting_of(model)
    with pytest.raises(NotImplementedError):  # a copy of it cannot be made on the CPU
        snkernels.profile(far, [1], "cpu")
    assert all(p.is_meta for p in far.parameters())
    model.compile_blocks(backend="eager")
    with pytest.raises(ValueError, match="device must be cpu, where the model is, got meta"):
        snkernels.profile(model, [1], "meta")


def test_a_wrapped_model() -> None:
    wrapper: Any = torch.nn.DataParallel(pair())
    assert snkernels.profile(wrapper, [1], rounds=1, seconds=0).seconds(0, 1) > 0
    with pytest.raises(TypeError, match=r"model must not be compiled .* model\.compile_blocks\(\)"):
        snkernels.profile(torch.compile(pair()), [1])


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_sizes": []}, ValueError, "batch_sizes must hold at least one integer"),
        ({"batch_sizes": [4, 0]}, ValueError, "batch_sizes must be at least 1, got 0"),
        ({"batch_sizes": [1.5]}, TypeError, "batch_sizes must be an integer"),
        ({"rounds": 0}, ValueError, "rounds must be at least 1, got 0"),
        ({"seconds": float("nan")}, ValueError, "seconds must be 0 or more, got nan"),
        ({"seconds": -1}, ValueError, "seconds must be 0 or more, got -1"),
        ({"check": [99]}, ValueError, "route id must be in .* got 99"),
        ({"check": "some"}, ValueError, "check must be \"all\" or route ids, got 'some'"),
        ({"check": []}, ValueError, "check must name at least one route, got none"),
        ({"check": ["0"]}, TypeError, "str"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        snkernels.profile(pair(), **{"batch_sizes": [1], **arguments})
