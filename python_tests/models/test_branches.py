"""Attention and MLP part by part: the same as the modules, and by ``ops.linear``."""

from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook

from snkernels.backends import use_backend
from snkernels.kernels import native
from snkernels.models import branches
from snkernels.models.anchors import run_blocks
from snkernels.models.branches import attend_from_class_token, in_parts
from snkernels.models.vit import PlainViT

MakeViT = Callable[..., PlainViT]

needs_kernel = pytest.mark.skipif(native.IMPORT_ERROR is not None, reason="_C is not built")
BACKENDS = ["torch", pytest.param("cpu", marks=needs_kernel)]
LINEARS = {"attn": ("qkv", "proj"), "mlp": ("fc1", "fc2")}


@pytest.fixture
def projected(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """The widths of what went through ``ops.linear``."""
    widths: list[int] = []
    original = branches.linear

    def counted(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        widths.append(len(weight))
        return original(x, weight, bias)

    monkeypatch.setattr(branches, "linear", counted)
    yield widths


@pytest.fixture(params=["own", "timm"])
def block(request: pytest.FixtureRequest, make_vit: MakeViT) -> Any:
    """A block of an anchor of width 12, with 3 heads."""
    if request.param == "own":
        return make_vit().blocks[0]
    timm: ModuleType = request.getfixturevalue("timm")
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
    vit = timm.models.VisionTransformer(**arguments).eval()
    request.getfixturevalue("randomise")(vit)
    return vit.blocks[0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", LINEARS)
def test_parts_are_the_module(block: Any, name: str, backend: str, projected: list[int]) -> None:
    module, tokens = getattr(block, name), torch.randn(2, 5, 12, requires_grad=True)
    wanted = [tokens, *module.parameters()]
    expected = module(tokens)
    weights = torch.randn_like(expected)
    with use_backend(backend):
        actual = in_parts(module)(tokens)
        grads = torch.autograd.grad(actual, wanted, weights)
    assert projected == [getattr(module, part).out_features for part in LINEARS[name]]
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(grads, torch.autograd.grad(expected, wanted, weights))


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_of_the_class_token(block: Any, backend: str, projected: list[int]) -> None:
    tokens = torch.randn(2, 5, 12)
    with use_backend(backend):
        actual = attend_from_class_token(block.attn, tokens)
    torch.testing.assert_close(actual, block.attn(tokens)[:, :1])
    assert projected == [12, 24, 12]


@pytest.mark.parametrize("part", ["attn.qkv", "attn.proj", "mlp.fc1", "mlp.act", "mlp.fc2"])
def test_a_part_that_others_have_changed_is_called(block: Any, part: str) -> None:
    module = block.get_submodule(part.partition(".")[0])
    tokens = torch.randn(2, 5, 12)
    expected = module(tokens)
    seen: list[nn.Module] = []
    handle = block.get_submodule(part).register_forward_hook(lambda m, *_: seen.append(m))
    torch.testing.assert_close(in_parts(module)(tokens), expected)
    assert seen == [block.get_submodule(part)]
    handle.remove()

    class Changed(type(block.get_submodule(part))):  # type: ignore[misc]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + 1

    block.get_submodule(part).__class__ = Changed
    torch.testing.assert_close(in_parts(module)(tokens), module(tokens))
    assert not torch.allclose(in_parts(module)(tokens), expected)


def test_the_class_token_of_a_changed_qkv_is_still_its_own(block: Any) -> None:
    tokens = torch.randn(2, 5, 12)
    block.attn.qkv.register_forward_hook(lambda _, __, out: out + 1)
    expected = block.attn(tokens)[:, :1]
    torch.testing.assert_close(attend_from_class_token(block.attn, tokens), expected)


@pytest.mark.parametrize("name", LINEARS)
def test_a_branch_that_does_more_is_called_as_a_module(timm: ModuleType, name: str) -> None:
    """Normalised queries, a norm in the MLP, dropout while it trains, a hook, a compiled one."""
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
    vit = timm.models.VisionTransformer(**arguments, proj_drop_rate=0.5)
    module = getattr(vit.blocks[0], name)
    assert in_parts(module.train()) is module
    assert in_parts(module.eval()) is not module
    handle = module.register_forward_pre_hook(lambda *_: None)
    assert in_parts(module) is module
    handle.remove()
    module.compile(backend="eager")
    assert in_parts(module) is module
    other = timm.models.VisionTransformer(
        **arguments, qk_norm=True, scale_mlp_norm=True, norm_layer=nn.LayerNorm
    ).eval()
    assert in_parts(getattr(other.blocks[0], name)) is getattr(other.blocks[0], name)


def test_attention_of_timm_drops_by_its_own_mode(timm: ModuleType) -> None:
    arguments = {"img_size": 8, "patch_size": 4, "embed_dim": 12, "depth": 1, "num_heads": 3}
    attention = timm.models.VisionTransformer(**arguments, attn_drop_rate=0.5).blocks[0].attn
    attention.train()
    attention.attn_drop.eval()
    assert in_parts(attention) is attention
    attention.eval()
    assert in_parts(attention) is not attention
    attention.fused_attn = False  # it then looks at its `scale`, which may be any
    assert in_parts(attention) is attention


@pytest.mark.parametrize("part", ["attn", "attn.proj", "mlp", "mlp.fc1"])
def test_a_class_that_others_have_patched_is_called(
    block: Any, part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module, tokens = block.get_submodule(part.partition(".")[0]), torch.randn(2, 5, 12)
    expected = module(tokens)
    kind = type(block.get_submodule(part))
    original = kind.forward
    monkeypatch.setattr(kind, "forward", lambda self, x: original(self, x) + 1)
    torch.testing.assert_close(in_parts(module)(tokens), module(tokens))
    assert not torch.allclose(module(tokens), expected)


def test_hooks_of_all_modules_see_every_part(block: Any) -> None:
    seen: list[nn.Module] = []
    handle = register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        in_parts(block.mlp)(torch.randn(2, 5, 12))
    finally:
        handle.remove()
    assert {block.mlp, block.mlp.fc1, block.mlp.fc2} <= set(seen)


@needs_kernel
def test_blocks_run_in_parts_where_there_is_a_kernel(
    make_vit: MakeViT, projected: list[int]
) -> None:
    vit = make_vit()
    tokens = torch.randn(2, 5, 12)
    with use_backend("torch"):
        expected = run_blocks(vit, tokens, 0, 2)
    assert projected == []
    with use_backend("cpu"):
        torch.testing.assert_close(run_blocks(vit, tokens, 0, 2), expected)
    assert projected == [36, 12, 48, 12] * 2
