"""The library ops themselves, below autograd: torch's own checker, threads, forced backends."""

import pytest
import torch
from cases import OPS, Shape, make
from device import DEVICE

from snkernels import backends
from snkernels.kernels import native
from snkernels.ops import stitch, stitch_layer_norm
from snkernels.ops.library import OFFERED

about_the_cpu = pytest.mark.skipif(DEVICE != "cpu", reason="is about CPU memory")

SHAPE = Shape(20, 30, 40, 4)
LARGE = Shape(500, 300, 70, 20)  # several bands for each of many threads
STREAMED = Shape(2100, 1024, 40, 4)  # the CPU's outputs go past its caches


def arguments(dtype: torch.dtype, shape: Shape = SHAPE) -> dict[str, tuple]:
    t = make(OPS["stitch_layer_norm"], shape, dtype)
    bias = t["bias"]
    operands = (t["x"], t["weight"], t["bias"], t["lora_A"], t["lora_B"])
    norm = (t["norm_weight"], t["norm_bias"])
    grad = torch.randn(shape.M, shape.N).to(dtype)
    y, _, mean, rstd = torch.ops.snkernels.stitch_layer_norm(*operands, 0.5, *norm, 1e-6)
    offsets, tensors = torch.tensor([0, 7, shape.M]), [*operands[1:], *norm] * 2
    return {
        "multi_stitch": (t["x"], offsets, None, tensors, [0.5, 0.5], shape.N, True, 1e-6),
        "multi_stitch_backward": (
            *(None, grad, t["x"], offsets, None, tensors, [0.5, 0.5], y, mean, rstd),
            [True] * 13,
        ),
        "residual_layer_norm": (y, grad, bias, None, *norm, 1e-6, dtype),
        "residual_layer_norm_backward": (
            *(grad, grad, y, grad, bias, None, y, mean, rstd, *norm),
            [True] * 5,
        ),
        "stitch": (*operands, 0.5),
        "stitch_backward": (grad, *operands, 0.5, [True, False, True, True, True]),
        "stitch_layer_norm": (*operands, 0.5, *norm, 1e-6),
        "stitch_layer_norm_backward": (
            *(None, grad, *operands, 0.5, y, mean, rstd, *norm),
            [True, False, True, True, True, True, True],
        ),
    }


# `linear` is no op of its own, but a choice between torch's and `stitch`.
NAMES = [name for name in OFFERED if name != "linear"]


def test_every_op_has_arguments_here() -> None:
    assert list(arguments(torch.float32)) == sorted(NAMES)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["torch", DEVICE])
def test_opcheck(name: str, dtype: torch.dtype, backend: str) -> None:
    if dtype == torch.float64:
        backend = "torch"
    with backends.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.snkernels, name).default, arguments(dtype)[name])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("backend", ["torch", DEVICE])
def test_opcheck_of_columns_one_after_another(name: str, backend: str) -> None:
    """Outputs are laid out as the fake says, whatever the inputs are, or compiled code fails."""

    def transposed(argument: object) -> object:
        if isinstance(argument, list):
            return [transposed(each) for each in argument]
        two = isinstance(argument, torch.Tensor) and argument.dim() == 2
        return argument.t().contiguous().t() if two else argument

    args = tuple(map(transposed, arguments(torch.float32)[name]))
    with backends.use_backend(backend):
        torch.library.opcheck(getattr(torch.ops.snkernels, name).default, args)


@about_the_cpu
@pytest.mark.parametrize("name", [name for name in NAMES if "triton" in OFFERED[name]])
def test_opcheck_in_triton(name: str) -> None:
    """Outputs must not share memory, which gradients made in one buffer easily do."""
    with backends.use_backend("torch"):
        args = arguments(torch.float32, Shape(9, 5, 4, 2))[name]
    with backends.use_backend("triton"):
        torch.library.opcheck(getattr(torch.ops.snkernels, name).default, args)


@about_the_cpu
@pytest.mark.parametrize("isa", native._C.cpu_isas() if native._C else [])
def test_the_number_of_threads_changes_no_bit(isa: str) -> None:
    """Nor do rows that go through a kernel with others give other bits than alone."""
    before, best = torch.get_num_threads(), native._C.cpu_isa()
    results = []
    native._C.cpu_use_isa(isa)
    try:
        with backends.use_backend("cpu"):
            for threads in (1, 2, 3, 7):
                torch.set_num_threads(threads)
                torch.manual_seed(0)
                outputs = []
                for shape in (LARGE, STREAMED):
                    for name, args in arguments(torch.float32, shape).items():
                        out = getattr(torch.ops.snkernels, name)(*args)
                        outputs += [out] if isinstance(out, torch.Tensor) else list(out)
                results.append(outputs)
    finally:
        torch.set_num_threads(before)
        native._C.cpu_use_isa(best)
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a, b)


@about_the_cpu
def test_a_forced_backend_that_cannot_serve_says_why() -> None:
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    with (
        backends.use_backend("cuda"),
        pytest.raises(RuntimeError, match="cannot run stitch_layer_norm: "),
    ):
        stitch_layer_norm(x, weight)
    with backends.use_backend("cuda"):
        assert torch.equal(stitch(x, weight), stitch(x, weight))  # it has none, so its own choice
    with backends.use_backend("cpu"), pytest.raises(RuntimeError, match="not float64"):
        stitch(x.double(), weight.double())
    with pytest.raises(ValueError, match=r"backend must be one of torch, cpu.*'gpu'"):
        backends.use_backend("gpu").__enter__()
    assert backends.forced_backend() is None


@about_the_cpu
def test_where_cuda_is_forced_triton_does_the_rest(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(op: str, dtype: torch.dtype = torch.float32) -> str:
        with backends.use_backend("cuda"):
            return backends.choose(op, OFFERED[op], "cpu", dtype).backend

    assert chosen("residual_layer_norm") == chosen("residual_layer_norm_backward") == "triton"
    assert chosen("residual_layer_norm", torch.float64) == "torch"
    assert chosen("stitch") == "cpu"  # neither has it, so its own choice
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert chosen("residual_layer_norm") == "cpu"


@about_the_cpu
def test_without_the_compiled_module_torch_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "IMPORT_ERROR", "no such file")
    monkeypatch.setattr(backends, "PROVEN", {("stitch", "cpu"): ("cpu", "a record")})
    backends.forget_choices()
    try:
        choice = backends.choose("stitch", ("torch", "cpu"), "cpu", torch.float32)
        assert choice.backend == "torch"
        assert "no such file" in choice.reason
        assert stitch(torch.randn(4, 3), torch.randn(5, 3)).shape == (4, 5)
    finally:
        backends.forget_choices()


@about_the_cpu
def test_the_kernel_is_missed_only_where_it_is_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "IMPORT_ERROR", "no such file")
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    with backends.use_backend("cpu"):
        assert stitch(x.to("meta"), weight.to("meta")).shape == (4, 5)
        with pytest.raises(TypeError, match="x must be a tensor, but it is list"):
            stitch(x.tolist(), weight)
        with pytest.raises(RuntimeError, match=r"cannot run stitch: .*no such file"):
            stitch(x, weight)


@about_the_cpu
def test_the_compiled_module_refuses_what_it_would_misread() -> None:
    x, weight = torch.randn(4, 3), torch.randn(5, 3)
    with pytest.raises(ValueError, match=r"lora_B must have shape \(5, 2\), but it has \(5, 1\)"):
        native.stitch_forward(x, weight, None, torch.randn(2, 3), torch.randn(5, 1), 1.0)
    with pytest.raises(ValueError, match=r"weight must have shape \(5, 2\)"):
        native.stitch_forward(torch.randn(4, 2), weight, None, None, None, 1.0)
    with pytest.raises(ValueError, match="lora_A and lora_B go together"):
        native.stitch_forward(x, weight, None, torch.randn(2, 3), None, 1.0)
    with pytest.raises(TypeError, match="bias must be float32"):
        native.stitch_forward(x, weight, torch.zeros(5).double(), None, None, 1.0)


@about_the_cpu
def test_a_tensor_of_a_transform_that_has_ended_is_refused() -> None:
    leaked: list[torch.Tensor] = []

    def function(x: torch.Tensor) -> torch.Tensor:
        leaked.append(x)
        return x.sum()

    torch.func.grad(function)(torch.randn(4, 3))
    weight = torch.randn(5, 3, requires_grad=True)
    with pytest.raises(ValueError, match="x must be a tensor of now"):
        stitch_layer_norm(leaked[0], weight)
