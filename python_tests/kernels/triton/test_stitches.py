"""What the tests of the ops (python_tests/ops) do not show of the stitches in Triton.

Off a GPU they run in Triton's interpreter. It takes tiles that a GPU refuses (the tests of the
static report look at those), runs one program after the other, so that no race shows, and computes
tf32 as fp32; bf16 is right only as repaired in conftest.py. What that leaves open takes a GPU.
"""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import EPS, GROUPED, STITCHES, Op, Shape, make, run
from device import DEVICE
from judge import assert_as_exact_as_torch, error
from test_every_op import judge
from torch import Tensor

from snkernels.backends import use_backend
from snkernels.kernels.triton import configs
from snkernels.kernels.triton.multi_stitch_backward import multi_stitch_backward

MIDDLE = Shape(50, 100, 200, 20)
WIDE = Shape(50, 40, 385, 17)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


# What has a backend in Triton: use_backend would let all else run in torch.
IN_TRITON = {name: op for name, op in (STITCHES | GROUPED).items() if name != "stitch"}


@pytest.fixture(params=IN_TRITON.values(), ids=IN_TRITON.keys())
def op(request: pytest.FixtureRequest) -> Op:
    return request.param


@pytest.mark.usefixtures("right_bf16")
@pytest.mark.parametrize("shape", [MIDDLE, WIDE, Shape(7, 33, 65, 0)], ids=str)
def test_bf16(op: Op, shape: Shape) -> None:
    judge(op, make(op, shape, torch.bfloat16))


@pytest.mark.usefixtures("right_bf16")
@pytest.mark.parametrize("other", [torch.float32, torch.float16], ids=str)
def test_bf16_beside_other_dtypes(op: Op, other: torch.dtype) -> None:
    judge(op, make(op, MIDDLE, torch.bfloat16, other))
    judge(op, make(op, MIDDLE, other, torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_tiles_and_chunks(op: Op, dtype: torch.dtype) -> None:
    """Blocks so small that every loop and grid dimension takes several turns, with a rest."""
    with (
        configs.override("project", BLOCK_M=16, BLOCK_N=16, BLOCK_K=16),
        configs.override("merge", BLOCK_N=16, BLOCK_K=16, BLOCK_R=16),
        configs.override("outer", BLOCK_M=16, BLOCK_P=16, BLOCK_Q=16),
        configs.override("normalize_rows_backward", BLOCK_M=2, CTAS_PER_SM=1),
    ):
        judge(op, make(op, Shape(103, 35, 41, 37), dtype))


@pytest.mark.usefixtures("right_bf16")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_rank_intermediates_are_never_rounded_to_half(dtype: torch.dtype) -> None:
    """Seen in fp32 results. Here x Aᵀ is too large for fp16, and grad · B too small."""
    x, grad = (torch.randn(50, 100) * 16).to(dtype), (torch.randn(50, 200) * 2**-10).to(dtype)
    lora_A = (torch.randn(20, 100) * 2**10).to(dtype).float()
    lora_B = (torch.randn(200, 20) * 2**-12).to(dtype).float()
    weight = torch.zeros(200, 100, dtype=dtype)
    low, low_grad = x.double() @ lora_A.double().t(), grad.double() @ lora_B.double()
    assert low.abs().max() > 65504
    assert low_grad.abs().max() < 2**-14
    exact = low_grad.t() @ x.double(), grad.double().t() @ low

    group, needs = [weight, None, lora_A, lora_B, None, None], [False] * 7
    needs[3:5] = True, True
    residuals = None, None, None
    grads = multi_stitch_backward(grad, None, x, [0, 50], group, [1.0], *residuals, needs)
    for name, actual, expected in zip("AB", grads, exact, strict=True):
        assert error(actual, expected) < 2**-16 * expected.square().mean().sqrt().item(), name


@pytest.mark.parametrize("shape", [MIDDLE, WIDE], ids=str)
def test_layer_norm_is_of_the_y_that_is_returned(shape: Shape) -> None:
    """With a mean of 1000, y has three digits left in fp16; LN must agree with exactly those."""
    op = STITCHES["stitch_layer_norm"]
    tensors = make(op, shape, torch.float16)
    tensors["bias"] += 1000
    y, normed = op.call(tensors, 0.25)
    affine = tensors["norm_weight"], tensors["norm_bias"]

    def layer_norm(dtype: torch.dtype) -> Tensor:
        return F.layer_norm(y.to(dtype), y.shape[-1:], *(a.to(dtype) for a in affine), EPS)

    assert_as_exact_as_torch("LN(y)", normed, layer_norm(y.dtype), layer_norm(torch.float64))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_a_bad_row_leaves_the_others_alone(op: Op, dtype: torch.dtype) -> None:
    tensors = make(op, MIDDLE, dtype)
    spoilt = tensors | {"x": tensors["x"].clone()}
    spoilt["x"][3, 5] = float("inf")
    others = torch.arange(MIDDLE.M) != 3
    for good, bad in zip(op.call(tensors, 0.25), op.call(spoilt, 0.25), strict=True):
        assert not bad[3].isfinite().all()
        assert torch.equal(good[others], bad[others])


@pytest.mark.skipif(DEVICE == "cpu", reason="the interpreter computes tf32 as fp32")
def test_tf32_where_torch_allows_it(op: Op) -> None:
    tensors = make(op, Shape(300, 270, 200, 64), torch.float32)
    exact = run(op.eager, tensors, dtype=torch.float64)["output 0"]
    full = error(run(op.call, tensors)["output 0"], exact)
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        less = error(run(op.call, tensors)["output 0"], exact)
    finally:
        torch.backends.cuda.matmul.fp32_precision = "ieee"
    assert less > 20 * full
