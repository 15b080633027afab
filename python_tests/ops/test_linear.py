"""``linear``: what it computes wherever it is computed, and where that is."""

import importlib
import itertools
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from device import DEVICE
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.case import EAGER
from benchmarks.schema import Record
from benchmarks.subject import PHASES
from python_tests.judge import assert_as_exact_as_torch
from snkernels import backends
from snkernels.kernels import native
from snkernels.ops import linear
from snkernels.ops.library import OFFERED

OP = "linear"
module = importlib.import_module(
    "snkernels.ops.linear"
)  # the package has the function's name there

about_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="is about CPU memory")


def operands(rows: int, K: int, N: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    torch.manual_seed(0)
    tensors = torch.randn(rows, K), torch.randn(N, K) * max(K, 1) ** -0.5, torch.randn(N)
    return [t.to(dtype).requires_grad_() for t in tensors]


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize(
    ("rows", "K", "N"),
    # Few rows go by columns of the weight, and many by bands; with edges of both.
    [(1, 1, 1), (5, 3, 70), (90, 300, 210), (200, 40, 230), (400, 64, 96), (90, 0, 70), (0, 4, 3)],
)
@pytest.mark.usefixtures("two_threads")
def test_it_is_a_linear_layer(backend: str, rows: int, K: int, N: int, has_bias: bool) -> None:
    tensors = operands(rows, K, N)
    grad = torch.randn(rows, N)
    wanted = tensors if has_bias else tensors[:2]

    def results(function: object, dtype: torch.dtype) -> list[Tensor]:
        own = [t.detach().to(dtype).requires_grad_() for t in wanted]
        y = function(*own) if has_bias else function(*own, None)
        return [y.detach(), *torch.autograd.grad(y, own, grad.to(dtype))]

    actual = results(linear, torch.float32)
    torchs, exact = results(F.linear, torch.float32), results(F.linear, torch.float64)
    for name, *values in zip(("y", "x", "weight", "bias"), actual, torchs, exact, strict=False):
        assert_as_exact_as_torch(name, *values)


@about_the_cpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_has_the_same_bits_whatever_comes_with_it(backend: str, dtype: torch.dtype) -> None:
    """Whether dealt out by columns or by bands, to however many threads."""
    if backend == "torch":
        pytest.skip("torch's own GEMM promises nothing of the kind")
    before = torch.get_num_threads()
    try:
        for threads, K in itertools.product((1, 2, 5), (66, 64)):
            torch.set_num_threads(threads)
            x, weight, bias = (t.detach() for t in operands(700, K, 75, dtype))
            whole = linear(x, weight, bias)
            for rows in (1, 13, *[90, 140, 280] * 20):
                assert torch.equal(linear(x[:rows], weight, bias), whole[:rows])
    finally:
        torch.set_num_threads(before)


@about_the_cpu
@pytest.mark.parametrize("has_bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("N", [1536, 1552, 1543])  # whole panels; a tail, streamed; one that is not
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.usefixtures("two_threads")
def test_a_large_weight_by_columns_gives_the_bits_that_bands_give(
    backend: str, dtype: torch.dtype, N: int, has_bias: bool
) -> None:
    """980 rows of it go by columns, past the caches; 1400 by bands."""
    if backend == "torch":
        pytest.skip("torch's own GEMM promises nothing of the kind")
    x, weight, bias = (t.detach() for t in operands(1400, 700, N, dtype))
    given = bias if has_bias else None
    assert torch.equal(linear(x[:980], weight, given), linear(x, weight, given)[:980])


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Who computed each call, on a machine where the kernel is known to be faster."""
    made: list[str] = []
    kernel, torchs, at_once = module.stitch, F.linear, native.linear

    def counted(name: str, function: object) -> object:
        def call(*args: object) -> object:
            made.append(name)
            return function(*args)

        return call

    def computed(*args: object) -> Tensor | None:
        y = at_once(*args)
        made.extend(["kernel"] * (y is not None))
        return y

    monkeypatch.setattr(native, "linear", computed)
    monkeypatch.setattr(module, "stitch", counted("kernel", kernel))
    monkeypatch.setattr(module.F, "linear", counted("torch", torchs))
    monkeypatch.setitem(backends.PROVEN, ("linear", "cpu"), ("cpu", "a record"))
    backends.forget_choices()
    yield made
    monkeypatch.undo()
    backends.forget_choices()


@about_the_cpu
def test_the_kernel_computes_what_is_large_enough(calls: list[str]) -> None:
    assert native.IMPORT_ERROR is None
    large, small = operands(130, 1024, 1024), operands(130, 512, 512)
    linear(*large)
    linear(*small)
    linear(*operands(1 << 20, 8, 8))
    linear(*operands(100, 1024, 1024))  # few rows share the packed weight
    linear(large[0].view(10, 13, 1024), *large[1:])
    assert calls == ["kernel", "torch", "kernel", "torch", "kernel"]
    calls.clear()
    for backend, who in (("cpu", "kernel"), ("torch", "torch"), ("triton", "torch")):
        with backends.use_backend(backend):
            linear(*small)
            linear(*large)
        assert calls == [who] * 2
        calls.clear()


@about_the_cpu
def test_a_forced_kernel_says_what_does_not_fit() -> None:
    with backends.use_backend("cpu"):
        with pytest.raises(ValueError, match=r"x must have shape \(\.\.\., 3\)"):
            linear(torch.tensor(1.0), torch.randn(4, 3))
        with pytest.raises(ValueError, match="weight must have shape"):
            linear(torch.randn(2, 3), torch.tensor(1.0))


@about_the_cpu
def test_torch_computes_what_was_not_measured(calls: list[str]) -> None:
    large = operands(130, 1024, 1024)
    with torch.no_grad():
        linear(*large)
    assert calls == ["kernel"]
    calls.clear()
    linear(*(t.detach().bfloat16() for t in large))
    y = F.linear(*large).detach()
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(*large).dtype == torch.bfloat16
    linear(*(t.detach().double() for t in large))
    compiled = torch.compile(linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*large), F.linear(*large))
    with FlopCounterMode(display=False) as counter:
        linear(*large)
    assert counter.get_total_flops() == 2 * 130 * 1024 * 1024
    x, weight, bias = (t.detach() for t in large)
    torch.testing.assert_close(
        torch.func.vmap(linear, (0, None, None))(x[None], weight, bias)[0], y
    )
    torch.testing.assert_close(linear(x, weight.to_sparse_csr(), bias), y)
    torch.testing.assert_close(linear(x, weight.as_subclass(Subclass), bias).as_subclass(Tensor), y)
    torch.set_float32_matmul_precision("high")
    try:
        linear(*large)
    finally:
        torch.set_float32_matmul_precision("highest")
    threads = torch.get_num_threads()
    torch.set_num_threads(9)
    try:
        linear(*large)
    finally:
        torch.set_num_threads(threads)
    assert "kernel" not in calls


class Subclass(Tensor):
    """What quantization and sharding make of a weight; the layer stays an nn.Linear."""


@about_the_cpu
@pytest.mark.parametrize(("op", "device"), backends.PROVEN)
def test_what_is_proven_stands_in_the_record(op: str, device: str) -> None:
    """In the median of the shapes of a phase the kernel is the faster one."""
    backend, table = backends.PROVEN[op, device]
    record = Record.load(Path(__file__).parents[2] / Path(table).with_suffix(".json"))
    for phase in PHASES:
        faster = [
            entry.speedup[EAGER].median
            for case in record.cases
            if (case.op, case.phase) == (op, phase) and case.copies > 0
            for entry in case.entries
            if entry.name == f"{backend} backend"
        ]
        assert statistics.median(faster) > 1, phase


@about_the_cpu
def test_it_is_chosen_only_where_it_was_recorded() -> None:
    chosen = backends.choose("linear", OFFERED["linear"], "cpu", torch.float32).backend
    assert chosen == ("cpu" if native.AMD_WITH_AVX512 else "torch")
    assert backends.choose("linear", OFFERED["linear"], "cuda", torch.float32).backend == "torch"
