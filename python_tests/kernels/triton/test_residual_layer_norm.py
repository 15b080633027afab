"""What test_every_op.py does not show of ``residual_layer_norm`` in Triton (cf. test_stitches)."""

from collections.abc import Iterator

import pytest
import torch
import torch.nn.functional as F
from cases import EPS, OPS, Shape, make, run
from judge import assert_as_exact_as_torch
from test_every_op import judge

from snkernels.backends import use_backend
from snkernels.kernels.triton import configs

OP = OPS["residual_layer_norm"]


@pytest.fixture(autouse=True)
def _triton() -> Iterator[None]:
    with use_backend("triton"):
        yield


@pytest.mark.parametrize("width", [1, 2, 16, 17, 384, 2048, 2050])
def test_widths(width: int) -> None:
    """One value, a power of two and its neighbours, and rows that need more warps."""
    # The errors of a few values would be luck.
    judge(OP, make(OP, Shape(max(5, 400 // width), 1, width, 0), torch.float32))


@pytest.mark.usefixtures("right_bf16")
@pytest.mark.parametrize("parameters", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_bf16(parameters: torch.dtype) -> None:
    judge(OP, make(OP, Shape(50, 1, 100, 0), torch.bfloat16, parameters))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_many_chunks_of_many_blocks(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Samples of 21 rows, which begin anywhere in blocks of 4; chunks of 12, the last shorter."""
    monkeypatch.setattr(configs, "chunk", lambda *_: 12)
    with (
        configs.override("normalize_rows", BLOCK_M=4),
        configs.override("normalize_rows_backward", BLOCK_M=4),
    ):
        judge(OP, make(OP, Shape(105, 1, 41, 0), dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_layer_norm_is_of_the_sum_that_is_returned(dtype: torch.dtype) -> None:
    """With a mean of 1000 the sum has few digits left; LN must agree with exactly those."""
    tensors = make(OP, Shape(50, 1, 200, 0), dtype)
    tensors["h"] += 1000
    total, normed = OP.call(tensors, 1.0)
    affine = tensors["norm_weight"], tensors["norm_bias"]

    def layer_norm(dtype: torch.dtype) -> torch.Tensor:
        return F.layer_norm(total.to(dtype), total.shape[-1:], *(a.to(dtype) for a in affine), EPS)

    assert_as_exact_as_torch("LN", normed, layer_norm(dtype), layer_norm(torch.float64))


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_bad_row_leaves_the_others_alone() -> None:
    tensors = make(OP, Shape(50, 1, 100, 0), torch.float32)
    spoilt = tensors | {"branch": tensors["branch"].clone()}
    spoilt["branch"][3, 5] = float("inf")
    spoilt["drop_path_scale"] = torch.ones(5)
    tensors["drop_path_scale"] = torch.ones(5)
    good, bad = run(OP.call, tensors, wanted=("h", "branch")), run(OP.call, spoilt)
    others = torch.arange(50) != 3
    for name, value in good.items():
        assert torch.equal(value[others], bad[name][others]), name


@pytest.mark.parametrize(
    ("rows", "block", "expected"),
    [
        (0, 4, 4),
        (1, 4, 4),
        (1056, 4, 4),
        (1057, 4, 8),
        (12608, 2, 48),
        (3_000_000_000, 1, 11363637),
    ],
)
def test_chunks(rows: int, block: int, expected: int) -> None:
    """Whole blocks, of which 132 processors go through two chunks each, or fewer."""
    chunk = configs.chunk(rows, block, 2, torch.device("cpu"))
    assert chunk == expected
    assert chunk % block == 0
    assert chunk * 264 >= rows
