"""What every op must hold on every backend (see cases.py for the ops and shapes).

Triton runs under its interpreter here. That shows neither bf16 arithmetic, which it gets wrong
without a word, nor races: both wait for a GPU, so bf16 is left out for that backend.
"""

import itertools
from collections.abc import Callable

import pytest
import torch
from cases import OPS, SHAPES, STITCHES, Op, Shape, Tensors, learnt, make, run
from device import DEVICE
from judge import assert_as_exact_as_torch

from snkernels import reference
from snkernels.backends import use_backend

pytestmark = pytest.mark.usefixtures("nan_filled")

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
MIDDLE = Shape(50, 104, 200, 16)


@pytest.fixture(params=OPS.values(), ids=OPS.keys())
def op(request: pytest.FixtureRequest) -> Op:
    return request.param


@pytest.fixture(params=STITCHES.values(), ids=STITCHES.keys())
def stitch_op(request: pytest.FixtureRequest) -> Op:
    return request.param


def skip_what_the_interpreter_gets_wrong(backend: str, *dtypes: torch.dtype | None) -> None:
    if backend == "triton" and DEVICE == "cpu" and torch.bfloat16 in dtypes:
        pytest.skip("Triton's interpreter multiplies bf16 as raw bits; needs a GPU")


def draws(op: Op, shape: Shape, *dtypes: torch.dtype) -> list[Tensors]:
    """Arguments to judge by: of a single value many, as torch may be lucky and get one exact."""
    return [make(op, shape, *dtypes) for _ in range(30 if shape.M * shape.N == 1 else 1)]


def judge(op: Op, *arguments: Tensors, wanted: tuple[str, ...] | None = None) -> None:
    """By the errors for all arguments together."""

    def results(function: Callable[..., tuple], dtype: torch.dtype | None = None) -> Tensors:
        runs = [run(function, tensors, dtype=dtype, wanted=wanted) for tensors in arguments]
        return {name: torch.stack([each[name] for each in runs]) for name in runs[0]}

    actual, eager, exact = results(op.call), results(op.eager), results(op.eager, torch.float64)
    assert actual.keys() == exact.keys()
    for name in exact:
        assert actual[name].dtype == eager[name].dtype, name
        assert_as_exact_as_torch(name, actual[name], eager[name], exact[name])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_as_exact_as_torch(op: Op, backend: str, shape: Shape, dtype: torch.dtype) -> None:
    skip_what_the_interpreter_gets_wrong(backend, dtype)
    judge(op, *draws(op, shape, dtype))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("parameter_dtype", DTYPES, ids=str)
def test_torchs_own_layer_norm(
    op: Op, shape: Shape, parameter_dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the torch backend takes it on a GPU; for half tokens it serves only there."""
    monkeypatch.setattr(reference, "has_exact_layer_norm", lambda y: True)
    with use_backend("torch"):
        arguments = draws(op, shape, torch.float32, parameter_dtype)
        judge(op, *arguments)
        judge(op, *({n: t for n, t in own.items() if n != "norm_weight"} for own in arguments))
        assert not run(op.call, make(op, Shape(0, 30, 40, 4), torch.float32))["output 0"].numel()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_torchs_half_products(
    op: Op, shape: Shape, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the torch backend takes them on a GPU, of tokens and of gradients."""
    monkeypatch.setattr(reference, "compute_dtype", lambda x: x.dtype)
    with use_backend("torch"):
        arguments = draws(op, shape, dtype)
        judge(op, *arguments)
        judge(op, *arguments, wanted=tuple(n for n in learnt(arguments[0]) if n != "weight"))


def test_a_gradient_in_range_does_not_overflow_on_its_way(monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp16, where lora_B is still next to zero: that of the weight would be infinite."""
    monkeypatch.setattr(reference, "compute_dtype", lambda x: x.dtype)
    x, grad = torch.full((4096, 8), 8.0).half(), torch.full((4096, 16), 4.0).half()
    weight, lora_A = torch.zeros(16, 8).half(), torch.ones(4, 8).half()
    lora_B = torch.full((16, 4), 1e-4).half()
    needs = [False, False, False, True, True]
    grad_A, _ = reference.stitch_backward(grad, x, weight, None, lora_A, lora_B, 0.25, needs)
    exact = 0.25 * lora_B.double().t() @ grad.double().t() @ x.double()
    assert torch.allclose(grad_A.double(), exact, rtol=1e-3)


@pytest.mark.parametrize(
    ("dtype", "parameter_dtype"),
    [p for p in itertools.product(DTYPES, DTYPES) if p[0] != p[1]],
    ids=str,
)
def test_mixed_dtypes(
    op: Op, backend: str, dtype: torch.dtype, parameter_dtype: torch.dtype
) -> None:
    skip_what_the_interpreter_gets_wrong(backend, dtype, parameter_dtype)
    judge(op, make(op, MIDDLE, dtype, parameter_dtype))


def test_optional_arguments(op: Op, backend: str) -> None:
    """Every subset of the optional vectors, with and without the other optional tensors."""
    tensors = make(op, Shape(20, 30, 40, 5), torch.float32)
    for count in range(len(op.vectors) + 1):
        for absent in itertools.combinations(op.vectors, count):
            for others in ((), op.others):
                judge(op, {n: t for n, t in tensors.items() if n not in absent + others})


def test_only_the_gradients_that_are_asked_for(op: Op, backend: str) -> None:
    tensors = make(op, Shape(20, 30, 40, 5), torch.float32)
    for name in learnt(tensors):
        judge(op, tensors, wanted=(name,))
        judge(op, tensors, wanted=tuple(other for other in learnt(tensors) if other != name))


def test_two_widths_in_one_process(op: Op, backend: str) -> None:
    for shape in (Shape(20, 48, 80, 8), Shape(20, 80, 48, 8), Shape(20, 48, 80, 8)):
        judge(op, make(op, shape, torch.float32))


def test_strides(op: Op, backend: str) -> None:
    """Transposed, sliced and expanded tensors, none of them contiguous."""
    tensors = make(op, MIDDLE, torch.float32)
    strided = {
        name: value.t().contiguous().t() if value.dim() == 2 else value.repeat_interleave(2)[::2]
        for name, value in tensors.items()
    }
    assert not any(value.is_contiguous() for value in strided.values())
    judge(op, strided)
    width = tensors[op.tokens].shape[1]
    judge(op, tensors | {op.tokens: torch.randn(MIDDLE.M, 2 * width)[:, ::2]})
    judge(op, tensors | {op.tokens: torch.randn(1, width).expand(MIDDLE.M, -1)})


def test_leading_dimensions(stitch_op: Op, backend: str) -> None:
    op, tensors = stitch_op, make(stitch_op, Shape(24, 30, 40, 4), torch.float32)
    flat = op.call(tensors, 0.25)
    shaped = op.call(tensors | {"x": tensors["x"].view(2, 3, 4, 30)}, 0.25)
    single = op.call(tensors | {"x": tensors["x"][0]}, 0.25)
    for a, b, c in zip(flat, shaped, single, strict=True):
        assert b.shape == (2, 3, 4, 40)
        assert c.shape == (40,)
        assert torch.equal(a, b.view(24, 40))
        torch.testing.assert_close(c, a[0])


def test_no_rows(op: Op, backend: str) -> None:
    results = run(op.call, make(op, Shape(0, 30, 40, 4), torch.float32))
    for name, value in results.items():
        assert value.numel() == 0 or not value.any(), name
    assert results["output 0"].shape == (0, 40)


def test_no_outputs_but_a_low_rank_part(stitch_op: Op, backend: str) -> None:
    """Its intermediate has a size of its own, for which the width of the output says nothing."""
    if DEVICE == "cpu" and backend == "triton":
        pytest.skip("rows that fill the scratch memory take long in Triton's interpreter")
    results = run(stitch_op.call, make(stitch_op, Shape(20_000, 8, 0, 40), torch.float32))
    assert not results["grad of lora_A"].any()
    assert not results["grad of x"].any()


def test_rank_zero_tensors(stitch_op: Op, backend: str) -> None:
    op, tensors = stitch_op, make(stitch_op, Shape(20, 30, 40, 0), torch.float32)
    plain = op.call(tensors, 0.25)
    empty = op.call(tensors | {"lora_A": torch.empty(0, 30), "lora_B": torch.empty(40, 0)}, 0.25)
    for a, b in zip(plain, empty, strict=True):
        assert torch.equal(a, b)


def test_rows_with_a_large_mean(op: Op, backend: str) -> None:
    """E[x²] − E[x]² would lose the variance here."""
    tensors = make(op, MIDDLE, torch.float32)
    name = "bias" if "bias" in tensors else "h"
    judge(op, tensors | {name: tensors[name] + 1000})


def test_sums_over_many_rows(op: Op, backend: str) -> None:
    """Bias gradients: one long chain of additions loses digits that torch's sum of sums keeps."""
    if backend == "triton" and DEVICE == "cpu":
        pytest.skip("many rows take minutes in Triton's interpreter; needs a GPU")
    judge(op, make(op, Shape(25_000, 3, 48, 2), torch.float32))


def test_outputs_that_are_stored_past_the_caches(op: Op, backend: str) -> None:
    """As the CPU's kernels do with 3 · 2²⁰ values or more, where rows are whole vectors."""
    if not backend.startswith("cpu"):
        pytest.skip("only the compiled CPU kernels do")
    for wide in (1024, 1030, 1040):  # whole panels; a tail that is not streamed, and one that is
        judge(op, make(op, Shape(3100, 12, wide, 2), torch.float32))
        judge(op, make(op, Shape(3100, wide, 12, 2), torch.float32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_low_rank_parts_that_take_several_sums(
    stitch_op: Op, backend: str, dtype: torch.dtype
) -> None:
    """Beside the weight, as of few rows it is not merged, and of more terms than one sum takes."""
    if not backend.startswith("cpu"):
        pytest.skip(
            "only the compiled CPU kernels sum so many terms at a time, and take such ranks"
        )
    judge(stitch_op, make(stitch_op, Shape(30, 600, 610, 300), dtype))


@pytest.mark.parametrize("autocast_dtype", [torch.float16, torch.bfloat16], ids=str)
def test_autocast(op: Op, backend: str, autocast_dtype: torch.dtype) -> None:
    """fp32 arguments, gradients in fp32; outputs in autocast's dtype, but for a residual stream."""
    skip_what_the_interpreter_gets_wrong(backend, autocast_dtype)

    def under_autocast(tensors: dict[str, torch.Tensor], scaling: float) -> tuple:
        with torch.autocast(DEVICE, autocast_dtype):
            return op.call(tensors, scaling)

    def eager(tensors: dict[str, torch.Tensor], scaling: float) -> tuple:
        if op.tokens == "x":
            return op.eager(tensors | {"x": tensors["x"].to(autocast_dtype)}, scaling)
        total, normed = op.eager(tensors, scaling)
        return total, normed.to(autocast_dtype)

    tensors = make(op, MIDDLE, torch.float32)
    actual, same = run(under_autocast, tensors), run(eager, tensors)
    exact = run(op.eager, tensors, dtype=torch.float64)
    for name, value in actual.items():
        assert value.dtype == same[name].dtype, name
        assert_as_exact_as_torch(name, value, same[name], exact[name])


def test_autocast_leaves_fp64_alone(op: Op) -> None:
    tensors = make(op, Shape(20, 30, 40, 4), torch.float64)
    with torch.autocast(DEVICE, torch.bfloat16):
        assert all(output.dtype == torch.float64 for output in op.call(tensors, 0.25))


def test_same_bits_twice_and_arguments_untouched(op: Op, backend: str) -> None:
    tensors = make(op, Shape(300, 50, 70, 8), torch.float32)
    before = {name: value.clone() for name, value in tensors.items()}
    first, second = run(op.call, tensors), run(op.call, tensors)
    for name in first:
        assert torch.equal(first[name], second[name]), name
    for name, value in tensors.items():
        assert torch.equal(value, before[name]), name


def test_saved_tensors_and_incoming_gradients_are_not_written_to(op: Op, backend: str) -> None:
    tensors = make(op, MIDDLE, torch.float32)
    leaves = [tensors[name].requires_grad_() for name in learnt(tensors)]
    outputs = op.call(tensors, 0.25)
    incoming = [torch.randn_like(output) for output in outputs]
    copies = [t.clone() for t in (*outputs, *incoming)]
    first = torch.autograd.grad(outputs, leaves, incoming, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, incoming)
    for a, b in zip((*outputs, *incoming, *first), (*copies, *second), strict=True):
        assert torch.equal(a, b)


def test_each_output_may_be_unused(op: Op, backend: str) -> None:
    tensors = make(op, MIDDLE, torch.float32)
    for i in range(len(op.call(tensors, 0.25))):
        names = learnt(tensors)
        leaves = {n: t.clone().requires_grad_(n in names) for n, t in tensors.items()}
        expected = {n: t.clone().requires_grad_(n in names) for n, t in tensors.items()}
        op.call(leaves, 0.25)[i].square().sum().backward()
        op.eager(expected, 0.25)[i].square().sum().backward()
        for name, leaf in leaves.items():
            if expected[name].grad is None:
                assert leaf.grad is None, name
            else:
                torch.testing.assert_close(leaf.grad, expected[name].grad, rtol=1e-4, atol=1e-3)


def test_gradcheck(op: Op) -> None:
    tensors = make(op, Shape(5, 4, 6, 2), torch.float64)
    names = learnt(tensors)
    assert torch.autograd.gradcheck(
        lambda *values: op.call(tensors | dict(zip(names, values, strict=True)), 0.25),
        [tensors[name].requires_grad_() for name in names],
    )


def test_a_second_derivative_is_refused(op: Op, backend: str) -> None:
    tensors = make(op, MIDDLE, torch.float32)
    tensors[op.tokens].requires_grad_()
    (grad,) = torch.autograd.grad(
        op.call(tensors, 0.25)[0].square().sum(), [tensors[op.tokens]], create_graph=True
    )
    with pytest.raises(RuntimeError, match=f"^{op.library} is differentiable once"):
        grad.sum().backward()


def test_nor_is_one_of_a_constant_gradient_dropped(op: Op) -> None:
    """Of a sum the incoming gradient is ones, yet what it becomes depends on the parameters."""
    tensors = make(op, MIDDLE, torch.float32)
    tensors[op.tokens].requires_grad_()
    loss = op.call(tensors, 0.25)[0].sum()
    (grad,) = torch.autograd.grad(loss, [tensors[op.tokens]], create_graph=True)
    with pytest.raises(RuntimeError, match=f"^{op.library} is differentiable once"):
        (loss + grad.square().sum()).backward()


def test_transforms_are_refused(op: Op) -> None:
    """Those that an op without a gradient would run through, and get zeros of, too."""
    tensors = make(op, Shape(6, 5, 4, 2), torch.float32)
    tokens = tensors[op.tokens]

    def of(value: torch.Tensor) -> torch.Tensor:
        return op.call(tensors | {op.tokens: value}, 0.25)[0]

    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(tokens, tokens)
        with pytest.raises(RuntimeError, match="forward-mode differentiation"):
            of(dual)
    for transformed in (
        lambda: torch.func.grad(lambda value: of(value).sum())(tokens),
        lambda: torch.func.vmap(of)(tokens[None]),
        lambda: torch.func.jvp(of, (tokens,), (tokens,)),
    ):
        with pytest.raises(RuntimeError, match=r"torch\.func transforms .* the ops of snkernels"):
            transformed()


@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compiles_whole(op: Op, compiler: str) -> None:
    torch.use_deterministic_algorithms(False)
    tensors = make(op, MIDDLE, torch.float32)
    for backend in ("torch", DEVICE):
        torch.compiler.reset()
        compiled = torch.compile(op.call, fullgraph=True, backend=compiler)
        with use_backend(backend):
            expected, actual = run(op.call, tensors), run(compiled, tensors)
        for name in expected:
            torch.testing.assert_close(actual[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["torch", DEVICE])
def test_no_input_width(stitch_op: Op, name: str) -> None:
    """Of no features, y is the bias."""
    t = {"x": torch.empty(2, 5, 0), "weight": torch.empty(4, 0), "bias": torch.randn(4)}
    with use_backend(name):
        y = stitch_op.call(t, 0.25)[0]
    assert torch.equal(y, t["bias"].expand(2, 5, 4))


def test_meta_tensors(op: Op) -> None:
    tensors = {n: t.to("meta") for n, t in make(op, MIDDLE, torch.float32).items()}
    assert all(output.is_meta for output in op.call(tensors, 0.25))


@pytest.mark.skipif(DEVICE != "cpu", reason="the arguments are made in CPU memory")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(50, 99)}, r"x must have shape \(\.\.\., 104\).*\(50, 99\)"),
        ({"x": torch.ones(50, 100, dtype=torch.int64)}, r"x must be float16.*int64"),
        ({"weight": torch.randn(200)}, r"weight must have shape \(any, any\).*\(200,\)"),
        ({"bias": torch.randn(199)}, r"bias must have shape \(200\).*\(199,\)"),
        ({"bias": torch.ones(200, dtype=torch.int32)}, r"bias must be a floating.*int32"),
        ({"lora_A": torch.randn(16, 99)}, r"lora_A must have shape \(any, 104\).*\(16, 99\)"),
        ({"lora_B": torch.randn(200, 15)}, r"lora_B must have shape \(200, 16\).*\(200, 15\)"),
        ({"weight": torch.randn(200, 104).double()}, "weight must be at most float32.*float64"),
        ({"lora_B": None}, "lora_A is given and lora_B is not"),
        ({"lora_A": torch.randn(16, 104, device="meta")}, "lora_A must be on cpu.*meta"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_stitches(stitch_op: Op, change: dict, message: str) -> None:
    tensors = make(stitch_op, MIDDLE, torch.float32) | change
    with pytest.raises((TypeError, ValueError), match=message):
        stitch_op.call(tensors, 0.25)


@pytest.mark.parametrize("scaling", [float("nan"), float("inf"), "1"])
@pytest.mark.parametrize("name", [name for name, op in OPS.items() if op.tokens == "x"])
def test_scaling_that_is_no_number(name: str, scaling: float) -> None:
    tensors = make(OPS[name], MIDDLE, torch.float32)
    with pytest.raises(ValueError, match=f"scaling must be a finite number.*{scaling}"):
        OPS[name].call(tensors, scaling)


@pytest.mark.parametrize("eps", [float("nan"), -1e-6])
@pytest.mark.parametrize("name", [name for name in OPS if name.endswith("layer_norm")])
def test_eps_that_is_no_number_for_it(
    monkeypatch: pytest.MonkeyPatch, name: str, eps: float
) -> None:
    monkeypatch.setattr("cases.EPS", eps)
    tensors = make(OPS[name], MIDDLE, torch.float32)
    with pytest.raises(ValueError, match=rf"eps must be a finite number of at least 0.*{eps}"):
        OPS[name].call(tensors, 0.25)
