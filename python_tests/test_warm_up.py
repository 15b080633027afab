"""That ``warmup`` reaches all there is to compile and changes nothing; kernels without a GPU."""

import copy
import os
import subprocess
import sys
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import snkernels
from snkernels import StitchedViT, warm_up, warmup
from snkernels.models.vit import PlainViT


@pytest.fixture
def model() -> StitchedViT:
    small, large = (PlainViT(8, 4, 3, 5, width, depth, 2) for width, depth in ((8, 2), (12, 4)))
    return StitchedViT(small, large, rank=2)


def test_it_is_public() -> None:
    assert snkernels.warmup is warm_up.warmup


def test_every_kind_of_route_runs_alone_and_beside_the_others(
    model: StitchedViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[int, dict]] = []
    forward = model.forward
    monkeypatch.setattr(
        model, "forward", lambda x, **way: calls.append((len(x), way)) or forward(x, **way)
    )
    done = warmup(model, [3, 8], progress=False)
    *alone, together = [way for _, way in calls]
    ids = [way["stitch"] for way in alone]
    assert sorted(ids) == sorted(together["routes"])
    kinds = {route.direction for route in model.routes}
    assert {model.space.route(i).direction for i in ids} == kinds
    assert len(ids) == len(kinds)
    assert {size for size, _ in calls} == {1}  # on a CPU nothing depends on it
    assert (done.kernels, done.graphs, done.passes) == ((), 0, len(calls))
    assert f"{len(calls)} passes" in str(done)


@pytest.mark.parametrize("training", [False, True])
def test_nothing_is_changed(model: StitchedViT, training: bool) -> None:
    model.anchors[0].eval()
    for vit in model.anchors:
        for block in vit.blocks:
            block.drop_path1 = snkernels.models.vit.DropPath(0.5)
    model(torch.randn(2, 3, 8, 8), stitch=2).sum().backward()
    before = copy.deepcopy(model)
    grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    random = torch.get_rng_state()
    warmup(model, 2, training=training, progress=False)
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in model.modules()] == modes
    assert model.last_route == 2
    assert model.sampler.state_dict() == before.sampler.state_dict()
    assert any(grad is not None for grad in grads)
    for now, then, grad in zip(model.parameters(), before.parameters(), grads, strict=True):
        assert torch.equal(now, then)
        assert grad is None if now.grad is None else torch.equal(now.grad, grad)


def test_modes_are_restored_after_an_error(
    model: StitchedViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model, "forward", lambda *_, **__: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        warmup(model, 1)
    assert all(module.training for module in model.modules())


def test_a_frozen_model_has_no_backward(model: StitchedViT) -> None:
    assert warmup(model.requires_grad_(False), 1, training=True, progress=False).passes > 0


@pytest.mark.parametrize("training", [False, True])
def test_compiled_blocks_compile_nothing_afterwards(model: StitchedViT, training: bool) -> None:
    torch.compiler.reset()
    model.compile_blocks(backend="eager")
    done = warmup(model, [2, 4], training=training, progress=False)
    assert done.graphs > 0
    assert done.passes % 2 == 0  # both sizes ran
    model.train(training)
    graphs = warm_up._graphs()
    with torch.set_grad_enabled(training):
        for batch in (2, 3, 4, 7):
            for route in model.routes[::2]:
                model(torch.randn(batch, 3, 8, 8), stitch=route.id)
    assert warm_up._graphs() == graphs


def test_kernels_of_training_at_any_batch_size_are_those_of_the_warm_up() -> None:
    """In a process of its own: Triton's keys are asked for, as for a GPU, and not compiled."""
    code = """
import random
import torch, triton
from triton import knobs
from snkernels import StitchedViT, backends, use_backend, warmup
from snkernels.kernels.report.triton_kernels import NoGpu
from snkernels.kernels.triton import launch
from snkernels.models.vit import PlainViT

backends.obstacle = lambda backend, *_: None if backend in ("torch", "triton") else "not asked"
triton.runtime.driver.set_active(NoGpu(90))
keys = set()
knobs.runtime.jit_cache_hook = lambda *, key, fn, **_: keys.add((fn.name, str(key))) or True

def ask(kernel, grid, args, options):
    for argument in args:  # values do not matter, but must not stop the model
        if isinstance(argument, torch.Tensor) and argument.is_floating_point():
            argument.requires_grad or argument.nan_to_num_()
    kernel.warmup(*args, grid=grid, **options)

small, large = (PlainViT(8, 4, 3, 5, width, depth, 2) for width, depth in ((16, 2), (32, 4)))
model = StitchedViT(small, large, rank=4)
with use_backend("triton"), launch.launches_go_to(ask):
    for training in (False, True):
        warmup(model, [4, 1], training=training)
        model.train(training)
        seen = set(keys)
        print(training, len(seen))
        for _ in range(50 if training else 10):
            batch, route = random.randrange(1, 24), random.choice(model.routes).id
            images = torch.randn(batch, 3, 8, 8)
            with torch.set_grad_enabled(training):
                logits = model(images, stitch=route)
                if training:
                    torch.nn.functional.cross_entropy(logits, torch.ones(batch).long()).backward()
            assert keys == seen, (training, batch, route, keys - seen)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    inference, training = done.stdout.split("\n")[:2]
    assert int(inference.split()[1]) >= 4
    assert int(training.split()[1]) > int(inference.split()[1])


def test_compiled_kernels_are_listed_and_other_hooks_still_called() -> None:
    knobs = pytest.importorskip("triton").knobs
    seen: list[str] = []
    mine: Callable = lambda **facts: seen.append(facts["fn"].name)  # noqa: E731
    knobs.runtime.jit_post_compile_hook = mine
    try:
        with warm_up._compiled_kernels() as names:
            knobs.runtime.jit_post_compile_hook(
                fn=SimpleNamespace(name="module._merge_kernel"),
                compile={"signature": {"p_x": "*bf16", "M": "i32", "p_y": "*fp32"}},
            )
        assert names == ["_merge_kernel(*bf16, *fp32)"]
        assert seen == ["module._merge_kernel"]
        assert knobs.runtime.jit_post_compile_hook is mine
    finally:
        knobs.runtime.jit_post_compile_hook = None


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ([], "batch_sizes must hold at least one integer, got none"),
        (0, "each of batch_sizes must be at least 1, got 0"),
        ([4, -1], "each of batch_sizes must be at least 1, got -1"),
        ([4, 2.0], "each of batch_sizes must be an integer, got 2.0, a float"),
        (True, "each of batch_sizes must be an integer, got True, a bool"),
        ("4", "each of batch_sizes must be an integer, got '4', a str"),
    ],
)
def test_bad_sizes(model: StitchedViT, sizes: object, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        warmup(model, sizes)


def test_only_a_stitched_model() -> None:
    with pytest.raises(TypeError, match=r"model must be a StitchedViT, .* got Linear"):
        warmup(torch.nn.Linear(2, 2), 1)


def test_a_wrapped_model(model: StitchedViT) -> None:
    assert warmup(torch.nn.DataParallel(model), np.int64(2), progress=False).passes > 0
    with pytest.raises(TypeError, match=r"model must not be compiled .* model\.compile_blocks\(\)"):
        warmup(torch.compile(model), 2)
