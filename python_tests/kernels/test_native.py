"""What the compiled module makes of the tensors that it is given, and what it refuses."""

import hashlib
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from cases import OPS, Shape, make, run
from device import DEVICE
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from snkernels.backends import use_backend
from snkernels.kernels import native

pytestmark = [
    pytest.mark.skipif(native._C is None, reason="needs the compiled module"),
    pytest.mark.skipif(DEVICE != "cpu", reason="is about CPU memory"),
]

FAST = hasattr(torch.Tensor, "__dlpack_c_exchange_api__")


class Calls(TorchFunctionMode):
    """Names of the functions that were called on tensors; a look by DLPack is none."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.names.add(getattr(func, "__name__", ""))
        return func(*args, **(kwargs or {}))


class Subclass(Tensor):
    pass


def strided(tensor: Tensor) -> Tensor:
    """The same values, none of which are next to each other."""
    room = tensor.new_empty([2 * size for size in tensor.shape])
    view = room[tuple(slice(1, None, 2) for _ in tensor.shape)]
    return view.copy_(tensor)


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "parameter": nn.Parameter,
    "strided": strided,
    "transposed": lambda t: t.t().contiguous().t(),
    "subclass": lambda t: t.as_subclass(Subclass),
    "of a longer storage": lambda t: torch.cat([t, t])[len(t) :],
    "inference": torch.inference_mode()(torch.clone),
}


def operands(rows: int = 5) -> list[Tensor]:
    """x, W, b, A and B."""
    sizes = [(rows, 12), (7, 12), (7,), (3, 12), (7, 3)]
    return [torch.randn(size) for size in sizes]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS.keys())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_tensors_of_every_kind(kind: Callable[[Tensor], Tensor], dtype: torch.dtype) -> None:
    plain = [t.to(dtype) for t in operands()]
    with torch.no_grad():
        exact = native.stitch_forward(*(t.float() for t in plain), 0.5)
        y = native.stitch_forward(*(kind(t) for t in plain), 0.5)
        assert y.dtype == dtype
        # Computed in fp32 whatever comes in, and rounded once.
        assert torch.equal(y.as_subclass(Tensor), exact.to(dtype))
        vectors = [t[2] for t in (plain, [kind(t) for t in plain])]
        x = exact.to(dtype)
        plainly, as_kind = (
            native.residual_layer_norm_forward(x, x, v, None, v, v, 1e-6, dtype) for v in vectors
        )
    assert all(torch.equal(a, b) for a, b in zip(plainly, as_kind, strict=True))


@pytest.mark.skipif(not FAST, reason="this torch has no table of functions for C code")
def test_tensors_are_looked_at_by_one_call_of_c() -> None:
    tensors = operands()
    for kind, slow in ((nn.Parameter, False), (strided, False), (KINDS["subclass"], True)):
        with Calls() as calls, torch.no_grad():
            native.stitch_forward(*tensors[:1], *(kind(t) for t in tensors[1:]), 0.5)
        assert ("data_ptr" in calls.names) == slow, kind


def digest() -> str:
    """Of all bits that ops and their backwards give on the compiled backend."""
    torch.manual_seed(0)
    bits = hashlib.sha256()
    with use_backend("cpu"):
        for op in OPS.values():
            for dtype in (torch.float32, torch.float16, torch.bfloat16):
                for shape in (Shape(50, 30, 40, 4), Shape(0, 5, 6, 2)):
                    for name, result in sorted(run(op.call, make(op, shape, dtype)).items()):
                        bits.update(f"{name} {result.dtype} {tuple(result.shape)}".encode())
                        bits.update(result.contiguous().view(torch.uint8).numpy().tobytes())
    return bits.hexdigest()


def test_a_torch_without_the_table_gives_the_same_bits() -> None:
    code = f"""
import sys, torch
sys.path[:0] = {sys.path!r}
if {FAST}:
    del torch.Tensor.__dlpack_c_exchange_api__
torch.set_num_threads(1)
from python_tests.kernels import test_native
with test_native.Calls() as calls:
    test_native.stitch()
assert "data_ptr" in calls.names
print(test_native.digest())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == digest()


def stitch(**change: Tensor | None) -> Tensor:
    names = ("x", "weight", "bias", "lora_A", "lora_B")
    arguments = dict(zip(names, operands(), strict=True)) | change
    return native.stitch_forward(*arguments.values(), 0.5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": torch.zeros(7).double()}, "bias must be float32, float16 or bfloat16 on cpu, "
         "but it is torch.float64 on cpu"),
        ({"bias": torch.zeros(7).int()}, "bias must be .* but it is torch.int32 on cpu"),
        ({"bias": torch.zeros(7, device="meta")}, "bias must be .* torch.float32 on meta"),
        ({"bias": torch.zeros(8)}, r"bias must have shape \(1, 7\), but it has \(8,\)"),
        ({"bias": torch.zeros(())}, r"bias must have shape \(1, 7\), but it has \(\)"),
        ({"bias": torch.zeros(1, 1, 7)}, r"bias must have shape \(1, 7\), but it has \(1, 1, 7\)"),
        ({"lora_A": torch.zeros(3, 11)}, r"lora_A must have shape \(any, 12\).*\(3, 11\)"),
        ({"lora_A": None}, "lora_A and lora_B go together"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)  # fmt: skip
def test_tensors_that_do_not_fit(change: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        stitch(**change)
    stitch()


def test_a_sparse_tensor_has_no_rows_in_memory() -> None:
    with pytest.raises(RuntimeError, match=r"data pointer|strides"):
        stitch(weight=torch.zeros(7, 12).to_sparse())
    stitch()


X, GRAD = torch.randn(5, 12), torch.randn(5, 7)
GROUP = [*operands()[1:], None, None]


def grouped(offsets: list[int], tensors: list[Tensor | None], backward: bool) -> None:
    scalings = [0.5, 0.25]
    if not backward:
        native.multi_stitch_forward(X, offsets, tensors, scalings, 7, False, 0.0)
        return
    needs = [True] * (1 + len(tensors))
    native.multi_stitch_backward(GRAD, None, X, offsets, tensors, scalings, None, None, None, needs)


def test_a_gradient_of_the_norm_needs_what_the_forward_returned() -> None:
    with pytest.raises(ValueError, match="y, mean and rstd must be given with grad_normed"):
        native.multi_stitch_backward(
            *(None, GRAD, X, [0, 2, 5], GROUP * 2, [0.5, 0.25], None, None, None), [True] * 13
        )


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_groups_that_do_not_fit(backward: bool) -> None:
    grouped([0, 2, 5], GROUP * 2, backward)
    for count in (0, 6, 9, 11):
        message = f"tensors must hold 6 for each group, but one has {count % 6}"
        with pytest.raises(ValueError, match=message):
            grouped([0, 2, 5], (GROUP * 2)[:count], backward)
    for offsets in ([0, 2, 6], [0, 9, 5], [1, 2, 5], [0, 2, 4], [0, -1, 5], [-9, 2, 5]):
        a, b, c = offsets
        message = rf"group_offsets must rise .* 5 rows .* rows \[{a}, {b}\) \[{b}, {c}\)"
        with pytest.raises(ValueError, match=message):
            grouped(offsets, GROUP * 2, backward)
    with pytest.raises(ValueError, match="weight must be given to get from 12 to 7 features"):
        grouped([0, 2, 5], [*GROUP, *[None] * 6], backward)
