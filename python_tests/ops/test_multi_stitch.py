"""The grouped ops against eager torch, group by group; rows, groups and gradients by name."""

import itertools

import pytest
import torch
from cases import EPS, OPS, STITCHES, Shape, Tensors, make, run
from device import DEVICE
from judge import assert_as_exact_as_torch
from torch import Tensor

from snkernels.backends import obstacle, use_backend
from snkernels.ops import StitchGroup, multi_stitch, multi_stitch_layer_norm, stitch
from snkernels.ops.library import OFFERED

pytestmark = pytest.mark.usefixtures("nan_filled")

OP = "multi_stitch"
K, N, SCALING = 30, 40, 0.25
SIZES = {
    "one": [17],
    "unequal": [5, 1, 33, 12],
    "with empty ones": [0, 7, 0, 0, 9, 0],
    "all empty": [0, 0],
    "hundreds": [i % 3 for i in range(300)],
    "tall beside low": [400, 3, 150],
}


@pytest.fixture(params=[False, True], ids=["multi_stitch", "multi_stitch_layer_norm"])
def normalize(request: pytest.FixtureRequest) -> bool:
    return request.param


def offsets_of(sizes: list[int], where: str = DEVICE) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(sizes)], device=where)


def make_groups(
    sizes: list[int], normalize: bool, dtype: torch.dtype, identity: frozenset[int] = frozenset()
) -> Tensors:
    """Arguments by name, "3.weight" being the weight of group 3; an identity group has none."""
    op = OPS["stitch_layer_norm" if normalize else "stitch"]
    out = K if identity else N
    tensors = {"x": torch.randn(sum(sizes), K).to(dtype)}
    for i in range(len(sizes)):
        own = make(op, Shape(1, K, out, 4), dtype)
        del own["x"]
        tensors |= {
            f"{i}.{name}": value
            for name, value in own.items()
            if i not in identity or name.startswith("norm")
        }
    return tensors


def group(tensors: Tensors, i: int) -> Tensors:
    prefix = f"{i}."
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def functions(sizes: list[int], normalize: bool, as_integers: bool = False, where: str = DEVICE):
    """The op and eager torch; ``where`` is the memory of the offsets if they are no integers."""
    offsets = offsets_of(sizes, where)
    if as_integers:
        offsets = offsets.tolist()
    single = STITCHES["stitch_layer_norm" if normalize else "stitch"]

    def grouped(t: Tensors, scaling: float) -> tuple[Tensor, ...]:
        groups = []
        for i in range(len(sizes)):
            own = group(t, i)
            groups.append(StitchGroup(own.pop("weight", None), **own, scaling=scaling))
        if normalize:
            return multi_stitch_layer_norm(t["x"], offsets, groups, EPS)
        return (multi_stitch(t["x"], offsets, groups),)

    def eager(t: Tensors, scaling: float) -> tuple[Tensor, ...]:
        parts = []
        for i, rows in enumerate(t["x"].split(sizes)):
            own = group(t, i)
            own.setdefault("weight", torch.eye(K, dtype=rows.dtype))
            parts.append(single.eager({"x": rows, **own}, scaling))
        return tuple(torch.cat(outputs) for outputs in zip(*parts, strict=True))

    return grouped, eager


def judge(sizes: list[int], normalize: bool, tensors: Tensors) -> None:
    grouped, eager = functions(sizes, normalize)
    wanted = tuple(n for n in tensors if n == "x" or sizes[int(n.split(".")[0])])
    actual = run(grouped, tensors, wanted=wanted)
    same = run(eager, tensors, wanted=wanted)
    exact = run(eager, tensors, dtype=torch.float64, wanted=wanted)
    assert actual.keys() == exact.keys()
    # All groups' gradients of one kind together: of one row each, any single one may be lucky.
    for kind in dict.fromkeys(name.split(".")[-1] for name in exact):
        names = [name for name in exact if name.split(".")[-1] == kind]
        assert all(actual[name].shape == exact[name].shape for name in names)
        values = [torch.cat([r[n].flatten() for n in names]) for r in (actual, same, exact)]
        assert_as_exact_as_torch(kind, *values)


@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES.keys())
def test_each_group_is_its_own_stitch(normalize: bool, backend: str, sizes: list[int]) -> None:
    if backend == "triton" and DEVICE == "cpu" and len(sizes) > 100:
        pytest.skip("hundreds of groups take minutes in Triton's interpreter; needs a GPU")
    judge(sizes, normalize, make_groups(sizes, normalize, torch.float32))


def test_identity_groups(normalize: bool, backend: str) -> None:
    sizes, identity = [5, 3, 0, 9], frozenset({1, 2})
    judge(sizes, normalize, make_groups(sizes, normalize, torch.float32, identity))


def test_identity_groups_have_a_scaling_that_is_a_number() -> None:
    group = StitchGroup(None, scaling=float("nan"))
    with pytest.raises(ValueError, match=r"groups\[0\]: scaling must be a finite number"):
        multi_stitch(torch.randn(3, 4), [0, 3], [group])


def test_groups_of_other_ranks_dtypes_and_strides(normalize: bool, backend: str) -> None:
    sizes = [5, 8, 3, 9]
    tensors = make_groups(sizes, normalize, torch.float32)
    for name in ("lora_A", "lora_B"):
        del tensors[f"0.{name}"]
    tensors["1.lora_A"], tensors["1.lora_B"] = torch.randn(7, K) / 5, torch.randn(N, 7)
    tensors["2.weight"] = tensors["2.weight"].t().contiguous().t()
    tensors["2.bias"] = tensors["2.bias"].half()
    del tensors["3.bias"]
    if normalize:
        del tensors["0.norm_weight"], tensors["1.norm_bias"]
    judge(sizes, normalize, tensors)


@pytest.mark.parametrize("where", dict.fromkeys(("cpu", DEVICE)))
def test_groups_without_rows_get_none(normalize: bool, backend: str, where: str) -> None:
    """Or zeros where only a GPU knows the offsets."""
    sizes = SIZES["with empty ones"]
    tensors = make_groups(sizes, normalize, torch.float32)
    leaves = {name: value.requires_grad_() for name, value in tensors.items()}
    grouped, _ = functions(sizes, normalize, where=where)
    sum(o.square().sum() for o in grouped(leaves, SCALING)).backward()
    for name, leaf in leaves.items():
        if name == "x" or sizes[int(name.split(".")[0])]:
            assert leaf.grad.any(), name
        else:
            assert leaf.grad is None if where == "cpu" else not leaf.grad.any(), name


def test_an_unused_norm_gets_no_gradient(backend: str) -> None:
    sizes = SIZES["unequal"]
    leaves = {n: t.requires_grad_() for n, t in make_groups(sizes, True, torch.float32).items()}
    grouped, eager = functions(sizes, True)
    grouped(leaves, SCALING)[0].square().sum().backward()
    expected = {n: t.detach().clone().requires_grad_() for n, t in leaves.items()}
    eager(expected, SCALING)[0].square().sum().backward()
    for name, leaf in leaves.items():
        if expected[name].grad is None:
            assert leaf.grad is None, name
        else:
            torch.testing.assert_close(leaf.grad, expected[name].grad, rtol=1e-4, atol=1e-4)


def test_where_the_host_cannot_tell_absent_groups_get_zeros(normalize: bool) -> None:
    """Compiled code must not look into tensors. Integers it knows, and then gives None."""
    torch.use_deterministic_algorithms(False)
    sizes = SIZES["with empty ones"]
    tensors = {
        n: t.requires_grad_() for n, t in make_groups(sizes, normalize, torch.float32).items()
    }
    for known in (False, True):
        grouped, _ = functions(sizes, normalize, as_integers=known)
        compiled = torch.compile(grouped, fullgraph=True, backend="aot_eager")
        sum(o.square().sum() for o in compiled(tensors, SCALING)).backward()
        for name, leaf in tensors.items():
            if name == "x" or sizes[int(name.split(".")[0])]:
                assert leaf.grad.any(), name
            else:
                assert leaf.grad is None if known else not leaf.grad.any(), name
            leaf.grad = None


def test_compiled_code_meets_bad_offsets_when_it_runs() -> None:
    torch.use_deterministic_algorithms(False)
    compiled = torch.compile(multi_stitch, fullgraph=True, backend="aot_eager")
    for name in OFFERED["multi_stitch"]:
        if obstacle(name, "cpu", X.dtype):
            continue
        with use_backend(name):
            compiled(X, OFFSETS, GROUPS)
            for offsets in ([0, 9, 5], [0, 2, 6], [1, 2, 5], [0, -1, 5]):
                with pytest.raises(ValueError, match=r"group_offsets must rise from 0 to the 5"):
                    compiled(X, torch.tensor(offsets, device="cpu"), GROUPS)


def test_the_library_op_meets_groups_that_do_not_fit() -> None:
    tensors = [W, None, None, None, None, None] * 2
    for name in OFFERED["multi_stitch"]:
        if obstacle(name, "cpu", X.dtype):
            continue

        def forward(offsets: list[int], tensors: list[Tensor | None]) -> None:
            in_memory = torch.tensor(offsets, device="cpu")
            operands = X, in_memory, None, tensors, [1.0, 1.0]
            torch.ops.snkernels.multi_stitch(*operands, 4, True, EPS)

        def backward(offsets: list[int], tensors: list[Tensor | None]) -> None:
            in_memory, y, rows = torch.tensor(offsets, device="cpu"), X @ W.t(), X.sum(1)
            operands = X, in_memory, None, tensors, [1.0, 1.0], y, rows, rows
            torch.ops.snkernels.multi_stitch_backward(
                y, y, *operands, [t is not None for t in (X, *tensors)]
            )

        for function in (forward, backward):
            with use_backend(name):
                function([0, 2, 5], tensors)
                with pytest.raises(ValueError, match="must be given"):
                    torch.ops.snkernels.multi_stitch(
                        X, None, None, tensors, [1.0] * 2, 4, True, EPS
                    )
                with pytest.raises(ValueError, match="must rise from 0 to the 5 rows"):
                    torch.ops.snkernels.multi_stitch(
                        X, None, [0, 2, 4], tensors, [1.0] * 2, 4, True, EPS
                    )
                with pytest.raises(ValueError, match=r"tensors must hold 6 .* 2 groups.* are 11"):
                    function([0, 2, 5], tensors[:-1])
                for offsets in ([0, 5], [0, 2, 3, 5], [0]):
                    message = rf"group_offsets must have shape \(3,\).*\({len(offsets)},\)"
                    with pytest.raises(ValueError, match=message):
                        function(offsets, tensors)


def test_offsets_as_integers_and_as_a_tensor(normalize: bool, backend: str) -> None:
    sizes = SIZES["with empty ones"]
    tensors = make_groups(sizes, normalize, torch.float32)
    by_tensor = functions(sizes, normalize)[0](tensors, SCALING)
    by_integers = functions(sizes, normalize, as_integers=True)[0](tensors, SCALING)
    for a, b in zip(by_tensor, by_integers, strict=True):
        assert torch.equal(a, b)


def test_what_no_norm_needs_may_be_written_over(backend: str) -> None:
    """Without a LayerNorm the backward needs no y, so y is not kept, and may change in place."""
    sizes = SIZES["unequal"]
    leaves = {n: t.requires_grad_() for n, t in make_groups(sizes, False, torch.float32).items()}
    grouped, eager = functions(sizes, False)
    (expected,) = eager(leaves, SCALING)
    (y,) = grouped(leaves, SCALING)
    y *= 2
    names = ["x", "1.lora_B"]
    for actual, other in zip(
        torch.autograd.grad(y.sum(), [leaves[n] for n in names]),
        torch.autograd.grad(2 * expected.sum(), [leaves[n] for n in names]),
        strict=True,
    ):
        torch.testing.assert_close(actual, other, rtol=1e-4, atol=1e-4)


# Made on import, and so in CPU memory on a GPU too.
X, W = torch.randn(5, 3), torch.randn(4, 3)
OFFSETS = torch.tensor([0, 2, 5])
GROUPS = [StitchGroup(W), StitchGroup(W)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.randn(1, 5, 3)}, r"x must have shape \(rows, in\).*\(1, 5, 3\)"),
        ({"groups": []}, "groups must hold at least one group"),
        ({"groups": [GROUPS[0]]}, r"group_offsets must have shape \(2,\) for 1 groups.*\(3,\)"),
        ({"groups": [GROUPS[0], StitchGroup(W[:2])]}, r"output width, but have \[2, 4\]"),
        ({"groups": [GROUPS[0], StitchGroup(None)]}, r"output width, but have \[3, 4\]"),
        ({"groups": [GROUPS[0], StitchGroup(W[:, :2])]}, r"groups\[1\]: x must have shape"),
        (
            {"groups": [GROUPS[0], StitchGroup(W, norm_bias=torch.randn(3))]},
            r"groups\[1\]: norm_bias must have shape \(4\).*\(3,\)",
        ),
        (
            {"groups": [StitchGroup(None, bias=torch.randn(3))] * 2},
            r"groups\[0\]: weight must be given",
        ),
        ({"group_offsets": OFFSETS.int()}, "group_offsets must be int64.*int32"),
        ({"group_offsets": [0, 2.0, 5]}, r"must be an int64 tensor or integers.*\[0, 2\.0, 5\]"),
        ({"group_offsets": [0, 5]}, r"group_offsets must have shape \(3,\).*\(2,\)"),
        ({"group_offsets": [0, 6, 5]}, r"must rise from 0 to the 5 rows.*\[0, 6, 5\]"),
        ({"group_offsets": OFFSETS.flip(0)}, r"must rise from 0 to the 5 rows.*\[5, 2, 0\]"),
        ({"group_offsets": torch.tensor([0, 6, 5])}, r"must rise from 0 to the 5.*\[0, 6, 5\]"),
        ({"group_offsets": OFFSETS + 1}, r"must rise from 0 to the 5 rows.*\[1, 3, 6\]"),
        ({"group_offsets": OFFSETS.to("meta")}, "group_offsets must be on cpu.*meta"),
        (
            {"groups": [GROUPS[0], StitchGroup(W.to("meta"))]},
            r"groups\[1\]: weight must be on cpu.*meta",
        ),
        (
            {"groups": [GROUPS[0], StitchGroup(W, scaling=float("nan"))]},
            r"groups\[1\]: scaling must be a finite number.*nan",
        ),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_arguments(change: dict, message: str) -> None:
    arguments = {"x": X, "group_offsets": OFFSETS, "groups": GROUPS} | change
    with pytest.raises((TypeError, ValueError), match=message):
        multi_stitch_layer_norm(**arguments)
    with pytest.raises((TypeError, ValueError), match=message):
        multi_stitch(**arguments)


def test_groups_by_columns_and_by_bands_are_what_they_are_alone(backend: str) -> None:
    """Rank 0 and few rows: by columns. Their bits are those of each group in a call of its own."""
    if not backend.startswith("cpu"):
        pytest.skip("only the compiled CPU kernels deal columns out, and promise bits")
    sizes, K, N = [0, 90, 400, 13, 140, 280, 5], 64, 330
    offsets = [0, *itertools.accumulate(sizes)]
    x = torch.randn(offsets[-1], K)
    groups = [
        StitchGroup(
            torch.randn(N, K),
            torch.randn(N) if i % 3 else None,
            *((torch.randn(4, K), torch.randn(N, 4)) if i == 3 else (None, None)),
        )
        for i in range(len(sizes))
    ]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            together = multi_stitch(x, offsets, groups)
            for group, rows in zip(groups, itertools.pairwise(offsets), strict=True):
                alone = stitch(x[slice(*rows)], *group[:4])
                assert torch.equal(together[slice(*rows)], alone)
    finally:
        torch.set_num_threads(before)
