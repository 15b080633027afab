"""What the tests of the ops (python_tests/ops) do not show of the stitches in Triton.

Off a GPU they run in Triton's interpreter. It takes tiles that a GPU refuses (test_report.py looks
at those), runs one program after the other, so that no race shows, and computes tf32 as fp32; bf16
is right only as repaired in conftest.py. What that leaves open waits for a GPU.
"""

from collections.abc import Iterator
from types import SimpleNamespace

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
from snkernels.kernels.triton.operands import described
from snkernels.kernels.triton.products import factors
from snkernels.kernels.triton.stitch import stitch_backward

MIDDLE = Shape(50, 100, 200, 20)
WIDE = Shape(50, 40, 385, 17)


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.fixture(params=(STITCHES | GROUPED).values(), ids=(STITCHES | GROUPED).keys())
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
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("op", STITCHES.values(), ids=STITCHES.keys())
def test_loads_by_tma_have_the_bits_of_those_by_pointers(op: Op, dtype: torch.dtype) -> None:
    """Tiles that end beyond every edge; W by rows in the forward, by columns in the backward."""
    tensors = make(op, Shape(70, 40, 48, 16), dtype)
    with configs.override("project", BLOCK_M=32, BLOCK_N=32, BLOCK_K=16):
        with configs.override("project", TMA=0):
            expected = run(op.call, tensors)
        with configs.override("project", TMA=1):
            judge(op, tensors)
            for name, value in run(op.call, tensors).items():
                assert torch.equal(value, expected[name]), name


def by_tma(x: Tensor, weight: Tensor) -> tuple[bool, bool]:
    """Whether a projection loads by TMA, and its weight by rows."""
    config = {**configs.project(x.dtype, weight.dtype, "ieee", weight.shape[0]), "TMA": 1}
    options = factors(x, weight, config)[2]
    return bool(options["TMA"]), options["TRANSPOSED"]


def test_tma_only_where_it_can(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    x, weight = torch.zeros(6, 40, dtype=torch.float16), torch.zeros(24, 40, dtype=torch.float16)
    square = torch.zeros(40, 40, dtype=torch.float16)
    assert by_tma(x, weight) == (True, True)
    assert by_tma(x, square.t()) == (True, False)
    assert by_tma(x[::2], weight[1:]) == (True, True)
    assert by_tma(x.float(), weight.float()) == (False, False)
    for other in (
        torch.zeros(6, 41, dtype=torch.float16)[:, 1:],  # rows at odd addresses
        torch.zeros(247, dtype=torch.float16)[7:].view(6, 40),  # a first row at an odd one
        torch.zeros(6, 80, dtype=torch.float16)[:, ::2],
        torch.zeros(40, dtype=torch.float16).expand(6, 40),
        torch.zeros(0, 40, dtype=torch.float16),
    ):
        assert by_tma(other, weight) == (False, False)
    assert by_tma(torch.zeros(6, 20, dtype=torch.float16), weight[:, :20]) == (False, False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 9))
    old = SimpleNamespace(device=torch.device("cuda", 0))
    assert described(old, 16, 16) is None  # type: ignore[arg-type]


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

    needs = [False, False, False, True, True]
    grads = stitch_backward(grad, x, weight, None, lora_A, lora_B, 1.0, needs)
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
