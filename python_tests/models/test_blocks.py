from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from snkernels.backends import use_backend
from snkernels.kernels import native
from snkernels.models import blocks
from snkernels.models.anchors import embed, finish, run_blocks
from snkernels.models.vit import Block, PlainViT
from snkernels.ops.library import OFFERED

MakeViT = Callable[..., PlainViT]

needs_kernel = pytest.mark.skipif(native.IMPORT_ERROR is not None, reason="_C is not built")
BACKENDS = ["torch", pytest.param("cpu", marks=needs_kernel)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("init_values", [None, 1.0])
@pytest.mark.parametrize("stop", [1, 3])
def test_blocks_in_parts_are_the_blocks(
    make_vit: MakeViT, backend: str, init_values: float | None, stop: int
) -> None:
    vit = make_vit(depth=3, init_values=init_values)
    tokens = torch.randn(4, 5, 12)
    with use_backend(backend):
        actual = run_blocks(vit, tokens, 0, stop)
    torch.testing.assert_close(actual, vit.blocks[:stop](tokens))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_fused_pass_is_all_there_is_between_two_gemms(
    make_vit: MakeViT, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = make_vit(depth=3)
    calls = {"fused": 0, "norm": 0}
    fused, apart = blocks.residual_layer_norm, nn.LayerNorm.forward

    def counted(name: str, function: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            calls[name] += 1
            return function(*args)

        return call

    monkeypatch.setattr(blocks, "residual_layer_norm", counted("fused", fused))
    monkeypatch.setattr(nn.LayerNorm, "forward", counted("norm", apart))
    with use_backend(backend):
        finish(vit, torch.randn(2, 5, 12), 0)
    # norm1 of the first block has no branch before it; the last norm is that of the head.
    assert calls == ({"fused": 6, "norm": 1} if backend == "cpu" else {"fused": 0, "norm": 7})


def test_a_forced_backend_without_the_fused_pass_does_not_stop_a_block(
    make_vit: MakeViT, monkeypatch: pytest.MonkeyPatch
) -> None:
    vit = make_vit()
    tokens = torch.randn(2, 5, 12)
    monkeypatch.setitem(OFFERED, "residual_layer_norm", ("torch",))
    with use_backend("cpu"):
        torch.testing.assert_close(run_blocks(vit, tokens, 0, 2), vit.blocks(tokens))


def replica(module: nn.Module) -> nn.Module:
    """What nn.DataParallel makes for another GPU: a copy whose parameters are mere tensors."""
    copy = module._replicate_for_data_parallel()
    for name, child in module._modules.items():
        copy._modules[name] = replica(child)
    for name, parameter in module._parameters.items():
        setattr(copy, name, None if parameter is None else parameter.detach())
    return copy


def test_blocks_whose_weights_are_mere_tensors_run(make_vit: MakeViT) -> None:
    vit, images = make_vit(), torch.randn(2, 3, 8, 8)
    other = replica(vit)
    torch.testing.assert_close(finish(other, embed(other, images), 0), vit(images))


def gradients(vit: PlainViT, logits: Tensor) -> dict[str, Tensor]:
    names, parameters = zip(*vit.named_parameters(), strict=True)
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).view_as(logits)
    grads = torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True)
    assert all(grad is not None for grad in grads)
    return dict(zip(names, grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rate", [0.0, 0.4, 0.9])
@pytest.mark.parametrize("batch", [1, 7])
def test_stochastic_depth_equals_computing_and_zeroing(
    make_vit: MakeViT, backend: str, rate: float, batch: int
) -> None:
    dtype = torch.float32 if backend == "cpu" else torch.float64
    vit = make_vit(depth=4, drop_path_rate=rate).to(dtype).train()
    images = torch.randn(batch, 3, 8, 8, dtype=dtype)
    for seed in range(4):
        torch.manual_seed(seed)
        expected = vit(images)
        after = torch.get_rng_state()
        torch.manual_seed(seed)
        with use_backend(backend):
            actual = finish(vit, embed(vit, images), 0)
            assert torch.equal(torch.get_rng_state(), after)
            grads = gradients(vit, actual)
        torch.testing.assert_close(actual, expected)
        for name, grad in gradients(vit, expected).items():
            torch.testing.assert_close(grads[name], grad, rtol=1e-5, atol=1e-5, msg=name)


def test_dropped_samples_do_not_pass_the_branch(make_vit: MakeViT) -> None:
    vit = make_vit(drop_path_rate=0.5).train()
    block = vit.blocks[1]
    kept: list[Tensor] = []
    for branch in (block.attn, block.mlp):
        branch.register_forward_pre_hook(lambda _, args: kept.append(args[0]))
    drawn: list[Tensor] = []
    tokens = torch.randn(40, 5, 12)
    torch.manual_seed(3)
    for _ in range(2):
        drawn.append(block.drop_path1(torch.ones(40, 1)).flatten() > 0)
    torch.manual_seed(3)
    run_blocks(vit, tokens, 1, 2)
    assert [len(rows) for rows in kept] == [int(mask.sum()) for mask in drawn]
    assert torch.equal(kept[0], block.norm1(tokens)[drawn[0]])
    vit.eval()
    run_blocks(vit, tokens, 1, 2)
    assert [len(rows) for rows in kept[2:]] == [40, 40]


def test_the_mask_of_a_device_that_must_not_wait_is_multiplied_in(make_vit: MakeViT) -> None:
    """On the meta device no value can be looked at: whatever does raises."""
    block = make_vit(drop_path_rate=0.5).train().to("meta").blocks[1]
    branch, scale = blocks._branch(
        block.mlp, torch.empty(6, 5, 12, device="meta"), block.drop_path1
    )
    assert branch.shape == (6, 5, 12)
    assert scale is not None and scale.shape == (6,)


@pytest.mark.parametrize(
    "part", ["", "norm1", "ls1", "drop_path1", "norm2", "ls2", "drop_path2", "attn", "mlp"]
)
def test_hooks_of_a_block_and_its_parts_are_called(make_vit: MakeViT, part: str) -> None:
    vit = make_vit(drop_path_rate=0.5)
    tokens = torch.randn(2, 5, 12)
    expected = vit.blocks(tokens)
    for register in ("register_forward_pre_hook", "register_forward_hook"):
        seen: list[nn.Module] = []
        module = vit.blocks[1].get_submodule(part)
        handle = getattr(module, register)(lambda module, *_, seen=seen: seen.append(module))
        torch.testing.assert_close(run_blocks(vit, tokens, 0, 2), expected)
        assert seen == [module]
        handle.remove()


def test_the_norm_is_left_to_a_block_that_is_called_as_a_module(make_vit: MakeViT) -> None:
    first, second = make_vit().blocks
    second.register_forward_hook(lambda *_: None)
    assert blocks.entry_norm(first) is first.norm1
    assert blocks.entry_norm(second) is None


def test_what_others_have_made_of_a_block_is_respected(make_vit: MakeViT) -> None:
    class Doubled(Block):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    vit = make_vit()
    tokens = torch.randn(2, 5, 12)
    expected = vit.blocks(tokens)
    vit.blocks[1].__class__ = Doubled
    torch.testing.assert_close(run_blocks(vit, tokens, 0, 2), 2 * expected)
    vit = make_vit()
    vit.blocks[0].norm2.forward = torch.zeros_like
    torch.testing.assert_close(run_blocks(vit, tokens, 0, 2), vit.blocks(tokens))
    vit = make_vit()
    vit.blocks[0].norm2 = nn.RMSNorm(12)
    torch.testing.assert_close(run_blocks(vit, tokens, 0, 2), vit.blocks(tokens))


@pytest.mark.parametrize("changes", [{}, {"qkv_bias": False}, {"init_values": None}])
def test_the_last_block_computes_the_class_token_alone(
    make_vit: MakeViT, changes: dict[str, bool | None]
) -> None:
    vit = make_vit(depth=3, **changes).double()
    images = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    seen: list[tuple[int, ...]] = []
    for name in ("attn.proj", "mlp.fc1"):
        hook = lambda _, args, out: seen.append(tuple(out.shape[:2]))  # noqa: E731
        vit.blocks[2].get_submodule(name).register_forward_hook(hook)
    actual = finish(vit, embed(vit, images), 0)
    assert seen == [(3, 1), (3, 1)]
    expected = vit(images)
    torch.testing.assert_close(actual, expected)
    grads = gradients(vit, actual)
    for name, grad in gradients(vit, expected).items():
        torch.testing.assert_close(grads[name], grad, msg=name)


def test_attention_that_others_have_changed_computes_all_tokens(make_vit: MakeViT) -> None:
    class Projection(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    vit = make_vit()
    images = torch.randn(3, 3, 8, 8)
    attention = vit.blocks[1].attn
    seen: list[int] = []
    handle = attention.register_forward_hook(lambda *call: seen.append(call[2].shape[1]))
    torch.testing.assert_close(finish(vit, embed(vit, images), 0), vit(images))
    assert seen == [5, 5]
    handle.remove()
    attention.qkv.__class__ = Projection
    torch.testing.assert_close(finish(vit, embed(vit, images), 0), vit(images))
