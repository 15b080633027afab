"""What neither an interpreter nor a compiler can show: bf16, races, tiles that a GPU refuses.

The paper's shapes in every dtype, on every backend; the same bits run after run; captured graphs;
streams. Needs a GPU.
"""

import itertools

import pytest
import torch
from cases import EPS, GROUPED, OPS, Op, Shape, Tensors, make, run
from device import DEVICE
from judge import assert_as_exact_as_torch
from test_every_op import judge
from torch import Tensor

from snkernels.kernels import native
from snkernels.ops import StitchGroup, multi_stitch_layer_norm

if DEVICE == "cpu":
    pytest.skip("needs a GPU: SNKERNELS_TEST_DEVICE=cuda", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("nan_filled")

OP = "multi_stitch"  # of the tests that have no parameter `op`
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
S_TO_L = Shape(64 * 197, 384, 1024, 64)
PAPER = [
    S_TO_L,
    Shape(64 * 197, 1024, 384, 64),
    Shape(197, 768, 1024, 16),
    Shape(1000, 384, 768, 4),
    Shape(129, 1024, 1280, 0),
    Shape(300, 200, 1536, 33),
    Shape(500, 1280, 192, 128),
]
# Every number of slices that the Hopper kernel cuts a row into, 1 to 8, and of steps, 1 to 4.
CUT = [
    Shape(70, 8, 8, 1),
    Shape(127, 64, 136, 2),
    Shape(130, 136, 264, 64),
    Shape(300, 384, 296, 33),
    Shape(500, 512, 328, 128),
    Shape(129, 384, 392, 0),
    Shape(1000, 264, 520, 16),
    Shape(260, 384, 680, 4),
]


@pytest.fixture(params=OPS.values(), ids=OPS.keys())
def op(request: pytest.FixtureRequest) -> Op:
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [*PAPER, *CUT], ids=str)
def test_the_papers_shapes(op: Op, backend: str, shape: Shape, dtype: torch.dtype) -> None:
    judge(op, make(op, shape, dtype))


def test_the_hopper_kernel_takes_what_is_cut() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs compute capability 9.0")
    slices = set()
    for shape in (S_TO_L, *CUT):
        x, weight = torch.empty(1, shape.K).half(), torch.empty(shape.N, shape.K)
        assert native.cluster_kernel_obstacle(x, [weight]) is None, shape
        slices.add(native._C.cuda_sm90_kernel_for(shape.K, shape.N, False)[1])
    assert slices == set(range(1, 9))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("parameters", DTYPES, ids=str)
def test_weights_of_another_dtype(
    op: Op, backend: str, dtype: torch.dtype, parameters: torch.dtype
) -> None:
    """What a kernel merges, or casts, before it multiplies."""
    judge(op, make(op, Shape(300, 384, 1024, 20), dtype, parameters))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_same_bits_every_time(op: Op, backend: str, dtype: torch.dtype) -> None:
    """A race would show as bits that change."""
    tensors = make(op, S_TO_L, dtype)
    first = run(op.call, tensors)
    for _ in range(20):
        for name, value in run(op.call, tensors).items():
            assert torch.equal(value, first[name]), name


def test_a_captured_call_follows_its_arguments(op: Op, backend: str) -> None:
    if op in GROUPED.values():
        pytest.skip("it makes its groups anew in each call; see the captured call below")
    tensors, others = (make(op, Shape(300, 384, 1024, 16), torch.bfloat16) for _ in range(2))
    expected = op.call(others, 0.25)
    outputs, graph = captured(lambda: op.call(tensors, 0.25))
    for name, value in tensors.items():
        value.copy_(others[name])
    graph.replay()
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a, b)


def captured(call):
    """Outputs and graph of a call that was captured after a call that compiled it."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        outputs = call()
    return outputs, graph


def test_on_the_current_stream(op: Op, backend: str) -> None:
    """The arguments are made on that stream, and late."""
    source = make(op, S_TO_L, torch.bfloat16)
    expected = op.call(source, 0.25)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(10**7)
        outputs = op.call({name: value.clone() for name, value in source.items()}, 0.25)
    stream.synchronize()
    for a, b in zip(outputs, expected, strict=True):
        assert torch.equal(a, b)


SIZES = {
    "one": [3000],
    "unequal": [5000, 0, 1, 127, 128, 129, 3000],
    "more than one launch takes": [i * 37 % 200 for i in range(70)],
}


def make_groups(sizes: list[int], dtype: torch.dtype, ranks: list[int]) -> list[Tensors]:
    single = OPS["stitch_layer_norm"]
    return [
        make(single, Shape(rows, 384, 1024, ranks[i % len(ranks)]), dtype)
        for i, rows in enumerate(sizes)
    ]


def grouped(groups: list[Tensors], offsets: Tensor) -> tuple[Tensor, Tensor]:
    x = torch.cat([own["x"] for own in groups])
    parameters = [
        StitchGroup(**{n: t for n, t in own.items() if n != "x"}, scaling=0.25) for own in groups
    ]
    return multi_stitch_layer_norm(x, offsets, parameters, EPS)


def offsets_of(sizes: list[int]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)])


@pytest.mark.parametrize("ranks", [[64], [0], [64, 4, 0]], ids=str)
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_groups(backend: str, where: str, sizes: list[int], ranks: list[int]) -> None:
    groups = make_groups(sizes, torch.bfloat16, ranks)
    eager = OPS["stitch_layer_norm"].eager
    outputs = grouped(groups, offsets_of(sizes).to(where))
    same = [eager(own, 0.25) for own in groups]
    exact = [eager({n: t.double() for n, t in own.items()}, 0.25) for own in groups]
    for i, name in enumerate(("y", "LN(y)")):
        parts = [torch.cat([part[i] for part in all_groups]) for all_groups in (same, exact)]
        assert_as_exact_as_torch(name, outputs[i], *parts)


def test_one_group_has_the_bits_of_the_single_op(backend: str) -> None:
    if backend == "triton":
        pytest.skip("the products of its single op are torch's")
    (own,) = make_groups([3000], torch.bfloat16, [64])
    single = OPS["stitch_layer_norm"].call(own, 0.25)
    for a, b in zip(grouped([own], offsets_of([3000])), single, strict=True):
        assert torch.equal(a, b)


def test_a_captured_call_follows_its_offsets(backend: str) -> None:
    if backend == "torch":
        pytest.skip("it reads the offsets, so it cannot be captured")
    groups = make_groups([300, 200, 500], torch.bfloat16, [64])
    offsets = offsets_of([300, 200, 500])
    (y, normed), graph = captured(lambda: grouped(groups, offsets))
    for sizes in ([1000, 0, 0], [1, 998, 1], [0, 129, 871]):
        offsets.copy_(offsets_of(sizes))
        graph.replay()
        for a, b in zip((y, normed), grouped(groups, offsets_of(sizes)), strict=True):
            assert torch.equal(a, b)


def test_offsets_that_nobody_looked_at_stay_within_the_rows(backend: str) -> None:
    if backend == "torch":
        pytest.skip("it looks at the offsets, and refuses them")
    groups = make_groups([300, 200], torch.bfloat16, [16])
    for offsets in ([-5, 100, 9000], [400, 3, 450], [0, 2**40, 5]):
        grouped(groups, torch.tensor(offsets))
    torch.cuda.synchronize()
    y, _ = grouped(groups, offsets_of([300, 200]))
    assert y.isfinite().all()
