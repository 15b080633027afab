"""What test_every_op.py cannot ask of it: drop path by sample, a branch of another dtype."""

import pytest
import torch
from device import DEVICE

from snkernels.ops import residual_layer_norm

OP = "residual_layer_norm"


def test_one_token_has_no_samples_to_scale() -> None:
    with pytest.raises(ValueError, match="drop_path_scale must be None for h of one dimension"):
        residual_layer_norm(torch.ones(3), torch.ones(3), drop_path_scale=torch.ones(3))


def test_one_drop_path_value_for_each_sample(backend: str) -> None:
    h, branch = torch.randn(3, 4, 8), torch.randn(3, 4, 8)
    total, _ = residual_layer_norm(h, branch, drop_path_scale=torch.tensor([0.0, 2.0, 1.0]))
    assert torch.equal(total[0], h[0])
    torch.testing.assert_close(total[1], h[1] + 2 * branch[1])
    torch.testing.assert_close(total[2], h[2] + branch[2])


@pytest.mark.parametrize("scale", [None, torch.ones(3)], ids=["", "DropPath"])
def test_the_norm_may_be_changed_in_place(backend: str, scale: torch.Tensor | None) -> None:
    h = torch.randn(3, 4, 8, requires_grad=True)
    scale = None if scale is None else scale.to(h.device)
    total, normed = residual_layer_norm(h, torch.randn(3, 4, 8), drop_path_scale=scale)
    (2 * total.sum() + normed.mul_(3).sum()).backward()
    torch.testing.assert_close(h.grad, torch.full_like(h, 2.0))


def test_a_half_branch_joins_an_fp32_stream(backend: str) -> None:
    h, branch = torch.randn(3, 4, 8), torch.randn(3, 4, 8).half().requires_grad_()
    total, normed = residual_layer_norm(h, branch)
    assert total.dtype == normed.dtype == torch.float32
    total.sum().backward()
    assert branch.grad is not None
    assert branch.grad.dtype == torch.float16


@pytest.mark.skipif(DEVICE != "cpu", reason="the arguments are made in CPU memory")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"h": torch.tensor(1.0)}, "h must have at least one dimension"),
        ({"h": torch.ones(3, 4, 8, dtype=torch.int32)}, r"h must be float16.*int32"),
        ({"branch": torch.randn(3, 8)}, r"branch must have shape \(3, 4, 8\).*\(3, 8\)"),
        ({"layer_scale": torch.randn(7)}, r"layer_scale must have shape \(8\).*\(7,\)"),
        ({"drop_path_scale": torch.ones(4)}, r"drop_path_scale must have shape \(3\).*\(4,\)"),
        (
            {"drop_path_scale": torch.ones(3, requires_grad=True)},
            "drop_path_scale must not require grad",
        ),
        ({"branch": torch.randn(3, 4, 8, device="meta")}, "branch must be on cpu.*meta"),
        ({"branch": [1.0]}, "branch must be a tensor.*list"),
        ({"layer_scale": 1.0}, "layer_scale must be a tensor.*float"),
        ({"norm_weight": torch.randn(8, 1)}, r"norm_weight must have shape \(8\).*\(8, 1\)"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"h": torch.randn(3, 4, 8), "branch": torch.randn(3, 4, 8)} | change
    with pytest.raises((TypeError, ValueError), match=message):
        residual_layer_norm(**arguments)


def test_small_gradients_of_fp16_add_up(backend: str) -> None:
    """Each product is below what fp16 holds."""
    scale = torch.ones(64).half().requires_grad_()
    branch = torch.full((4096, 64), 1e-3).half()
    total, _ = residual_layer_norm(torch.zeros_like(branch), branch, scale)
    upper = torch.full_like(total, 1e-5)
    (grad,) = torch.autograd.grad(total, scale, upper)
    exact = (branch.double() * upper.double()).sum(0)
    torch.testing.assert_close(grad.double(), exact, rtol=2e-2, atol=0)


def test_what_is_dropped_does_not_overflow(backend: str) -> None:
    kept = torch.tensor([0.0, 1.0]).half()
    branch = torch.full((2, 3, 64), 300.0).half()
    scale = torch.full((64,), 300.0).half()
    total, _ = residual_layer_norm(torch.ones_like(branch), branch, scale, kept)
    assert torch.equal(total[0], torch.ones_like(total[0]))
