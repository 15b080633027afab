"""Arguments that are plainly right: no further checks, the same bits, and nothing unusual."""

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import pytest
import torch
from device import DEVICE
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from snkernels.backends import use_backend
from snkernels.kernels import native
from snkernels.ops import (
    StitchGroup,
    library,
    linear,
    multi_stitch_layer_norm,
    residual_layer_norm,
    stitch,
    stitch_layer_norm,
)
from snkernels.ops.library import tries_kernel

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="is about CPU memory"),
    pytest.mark.skipif(
        not hasattr(Tensor, "__dlpack_c_exchange_api__"),
        reason="this torch has no table of functions for C code",
    ),
]

WIDTH, OUT, RANK = 40, 24, 3
STITCHES = ["stitch", "stitch_layer_norm", "multi_stitch"]
SINGLE = ["residual_layer_norm", "stitch", "stitch_layer_norm"]  # with gradients of their own
OPS = ["linear", "residual_layer_norm", *STITCHES]
MODULES = {op: importlib.import_module(f"snkernels.ops.{op}") for op in OPS}


@pytest.fixture(autouse=True)
def _cpu_backend() -> Iterator[None]:
    assert native.IMPORT_ERROR is None, native.IMPORT_ERROR
    with use_backend("cpu"):
        yield


def others(op: str, x: Tensor) -> list[Tensor | None]:
    """The arguments after x."""
    if op == "residual_layer_norm":
        return [torch.randn(x.shape), torch.randn(WIDTH), torch.randn(WIDTH), torch.randn(WIDTH)]
    linears = [torch.randn(OUT, WIDTH), torch.randn(OUT)]
    low_rank = [] if op == "linear" else [torch.randn(RANK, WIDTH), torch.randn(OUT, RANK)]
    norm = [] if op in ("linear", "stitch") else [torch.randn(OUT), torch.randn(OUT)]
    return [*linears, *low_rank, *norm]


def call(op: str, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    if op == "linear":
        return (linear(x, *rest),)
    if op == "residual_layer_norm":
        branch, layer_scale, *norm = rest
        return residual_layer_norm(x, branch, layer_scale, None, *norm)
    if op == "stitch":
        return (stitch(x, *rest, 0.5),)
    if op == "stitch_layer_norm":
        return stitch_layer_norm(x, *rest[:4], 0.5, *rest[4:])
    group = StitchGroup(*rest, 0.5)
    return multi_stitch_layer_norm(x, [0, len(x) // 3, len(x)], [group, group])


def is_plain(op: str, x: Tensor, *rest: object, scaling: object = 0.5, eps: object = 1e-6) -> bool:
    """What the compiled module says of the arguments."""
    if op == "linear":
        return native.linear(x, *rest, 0, 0) is not None
    if op == "residual_layer_norm":
        return native.residual_layer_norm(x, *rest, eps) is not None
    stitches = [(*rest, *[None] * (6 - len(rest)), scaling)]
    if op == "multi_stitch":
        stitches.insert(0, (torch.ones(OUT, WIDTH), None, None, None, None, None, 1.0))
        return native.width_of_stitches(x, stitches) == OUT
    if op == "stitch":
        return native.stitch(x, stitches[0]) is not None
    return native.stitch_layer_norm(x, stitches[0], eps) is not None


TOKENS: dict[str, Callable[[], Tensor]] = {
    "rows": lambda: torch.randn(30, WIDTH),
    "one": lambda: torch.randn(WIDTH),
    "images": lambda: torch.randn(3, 10, WIDTH),
    "class tokens": lambda: torch.randn(3, 10, WIDTH)[:, :1],
    "some features": lambda: torch.randn(3, 10, 2 * WIDTH)[..., ::2],
    "four dimensions": lambda: torch.randn(2, 1, 3, 5, WIDTH)[..., :1, :],
    "one image for all": lambda: torch.randn(1, 10, WIDTH).expand(3, 10, WIDTH),
}
UNEQUALLY_FAR_APART = {
    "transposed": lambda: torch.randn(5, 6, WIDTH).transpose(0, 1),
    "patches alone": lambda: torch.randn(3, 10, WIDTH)[:, 1:],
}
CASES = [(op, t) for op in OPS for t in TOKENS if op != "multi_stitch" or t == "rows"]


def look_at_all(patch: pytest.MonkeyPatch) -> None:
    """Until ``patch`` is undone, nothing is taken for plain at once."""

    def never(op: str) -> bool:
        return False

    for module in MODULES.values():
        patch.setattr(module, "tries_kernel", never)


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Tensor, ...]]:
    """``call`` with all the checks of Python."""

    def run(*arguments: object) -> tuple[Tensor, ...]:
        with monkeypatch.context() as patch:
            look_at_all(patch)
            return call(*arguments)

    return run


@pytest.mark.parametrize(("op", "tokens"), CASES)
@pytest.mark.parametrize("isa", native._C.cpu_isas() if native._C else [])
def test_bits_are_the_same_and_nothing_else_is_looked_at(
    op: str,
    isa: str,
    tokens: str,
    looked_at: Callable[..., tuple[Tensor, ...]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    x = TOKENS[tokens]()
    rest = others(op, x)
    before = native._C.cpu_isa()
    native._C.cpu_use_isa(isa)
    try:
        for given in (rest, [rest[0], None, *rest[2:]]):
            expected = looked_at(op, x, *given)
            assert is_plain(op, x, *given) or tokens == "one image for all"
            with monkeypatch.context() as patch:
                if tokens != "one image for all":
                    patch.setattr(library, "is_transformed", None)
                learned = call(op, x.clone().requires_grad_(), *given)
                with torch.no_grad():
                    inferred = call(op, x, *given)
            for results in (inferred, learned):
                for actual, same in zip(results, expected, strict=True):
                    assert actual.is_contiguous()
                    assert torch.equal(actual, same)
    finally:
        native._C.cpu_use_isa(before)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", UNEQUALLY_FAR_APART)
def test_rows_that_are_not_equally_far_apart(op: str, tokens: str) -> None:
    x = UNEQUALLY_FAR_APART[tokens]()
    if op == "multi_stitch":
        x = x[0].t().contiguous().t()
    rest = others(op, x)
    results = call(op, x.detach().requires_grad_(), *rest)
    for actual, expected in zip(results, call(op, x.contiguous(), *rest), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("tokens", [*TOKENS, *UNEQUALLY_FAR_APART])
def test_gradients_of_tokens_in_any_shape(tokens: str) -> None:
    h = (TOKENS | UNEQUALLY_FAR_APART)[tokens]().requires_grad_()
    branch, *vectors = (t.requires_grad_() for t in others("residual_layer_norm", h))
    leaves = [h, branch, *vectors]
    total, normed = call("residual_layer_norm", *leaves)
    rows = (h.reshape(-1, WIDTH), branch.reshape(-1, WIDTH))
    flat = call("residual_layer_norm", *rows, *vectors)
    grad_total, grad_normed = torch.randn(h.shape), torch.randn(h.shape)
    for grads in ((grad_total, grad_normed), (grad_total, None), (None, grad_normed)):
        outputs = [
            (y, of_rows, g)
            for y, of_rows, g in zip((total, normed), flat, grads, strict=True)
            if g is not None
        ]
        actual = torch.autograd.grad(
            [y for y, _, _ in outputs],
            leaves,
            [g for _, _, g in outputs],
            retain_graph=True,
            allow_unused=True,
        )
        expected = torch.autograd.grad(
            [y for _, y, _ in outputs],
            leaves,
            [g.reshape(-1, WIDTH) for _, _, g in outputs],
            retain_graph=True,
            allow_unused=True,
        )
        for a, e in zip(actual, expected, strict=True):
            assert (a is None) == (e is None)
            assert a is None or torch.equal(a, e)


@pytest.mark.parametrize("frozen", [(), (0,), (1,), (1, 2, 5), (3, 4)], ids=str)
@pytest.mark.parametrize("op", SINGLE)
def test_gradients_have_the_same_bits(
    op: str, frozen: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(3, 10, WIDTH)
    leaves = [t.requires_grad_(i not in frozen) for i, t in enumerate([x, *others(op, x)])]
    trained = [leaf for leaf in leaves if leaf.requires_grad]
    outputs = call(op, *leaves)
    upper = [torch.randn(y.shape) for y in outputs]
    for used in ([0], [1], [0, 1]) if len(outputs) == 2 else ([0],):
        found = []
        for setting in ("plain", "looked at"):
            with monkeypatch.context() as patch:
                if setting == "plain":
                    patch.setattr(library, "is_transformed", None)
                else:
                    look_at_all(patch)
                given = [outputs[i] for i in used], trained, [upper[i] for i in used]
                found.append(torch.autograd.grad(*given, retain_graph=True, allow_unused=True))
        for leaf, actual, expected in zip(trained, *found, strict=True):
            assert (actual is None) == (expected is None)
            if actual is not None and expected is not None:
                assert actual.shape == leaf.shape
                assert actual.is_contiguous()
                assert torch.equal(actual, expected)


def test_gradients_that_are_not_plain() -> None:
    op = "stitch_layer_norm"
    x = torch.randn(6, WIDTH)
    parameters = (*others(op, x), 0.5)
    x.requires_grad_()
    y, normed, mean, rstd = native.stitch_layer_norm(x, parameters, 1e-6)
    x.requires_grad_(False)
    given = [torch.randn(y.shape), torch.randn(normed.shape), x, parameters, y, mean, rstd]
    needs = [True] * 7
    assert native.stitch_gradients(*given, needs) is not None
    for i in (0, 1, 2, 4, 5, 6):
        for unusual, change in UNUSUAL.items():
            changed = [*given[:i], change(given[i]), *given[i + 1 :]]
            assert native.stitch_gradients(*changed, needs) is None, (i, unusual)
    for i in (4, 5, 6):
        assert native.stitch_gradients(*given[:i], None, *given[i + 1 :], needs) is None, i
    apart = mean.repeat_interleave(2)[::2]
    assert native.stitch_gradients(*given[:5], apart, rstd, needs) is None
    assert native.stitch_gradients(None, None, *given[2:], needs) is None
    assert native.stitch_gradients(*given[:3], (None, *parameters[1:]), *given[4:], needs) is None
    assert native.stitch_gradients(*given, needs[1:]) is None
    assert native.stitch_gradients(*given, [1] * 7) is None
    of_y = native.stitch_gradients(given[0], None, x, parameters, None, None, None, needs)
    assert of_y is not None and [g is None for g in of_y] == [False] * 5 + [True] * 2


def test_gradients_of_a_residual_that_are_not_plain() -> None:
    op = "residual_layer_norm"
    h = torch.randn(6, WIDTH, requires_grad=True)
    branch, *vectors = others(op, h)
    total, normed, mean, rstd = native.residual_layer_norm(h, branch, *vectors, 1e-6)
    grads = torch.randn(total.shape), torch.randn(normed.shape)
    given = [*grads, h.detach(), branch, *vectors, total, mean, rstd]
    needs = [True] * 5
    assert native.residual_gradients(*given, needs) is not None
    for i, tensor in enumerate(given):
        for unusual, change in UNUSUAL.items():
            changed = [*given[:i], change(tensor), *given[i + 1 :]]
            assert native.residual_gradients(*changed, needs) is None, (i, unusual)
    for i in (2, 3, 7, 8, 9):
        assert native.residual_gradients(*given[:i], None, *given[i + 1 :], needs) is None, i
    apart = mean.repeat_interleave(2)[::2]
    assert native.residual_gradients(*given[:8], apart, rstd, needs) is None
    assert native.residual_gradients(None, None, *given[2:], needs) is None
    assert native.residual_gradients(*given, needs[1:]) is None
    assert native.residual_gradients(*given, [1] * 5) is None
    assert native.residual_gradients(*given, tuple(needs)) is None
    of_sum = native.residual_gradients(given[0], None, *given[2:], needs)
    assert of_sum is not None and [g is None for g in of_sum] == [False] * 3 + [True] * 2


@pytest.mark.parametrize("watched", ["forward", "backward"])
@pytest.mark.parametrize("op", SINGLE)
def test_the_way_in_makes_no_difference_to_checkpoints(op: str, watched: str) -> None:
    """In the backward they compare the shapes of what is saved with a second forward's."""
    x = torch.randn(3, 10, WIDTH, requires_grad=True)
    rest = others(op, x)
    expected = torch.autograd.grad(sum(y.sum() for y in call(op, x, *rest)), x)
    counted = {watched: FlopCounterMode(display=False)}
    with counted.get("forward", nullcontext()):
        results = checkpoint(call, op, x, *rest, use_reentrant=False)
        total = sum(y.sum() for y in results)
    with counted.get("backward", nullcontext()):
        assert torch.equal(*torch.autograd.grad(total, x), *expected)


@pytest.mark.parametrize("learnt", [True, False])
@pytest.mark.parametrize(
    ("dtype", "of_branch"),
    [
        (torch.float32, torch.float32),  # the quick way
        (torch.bfloat16, torch.bfloat16),
        (torch.float32, torch.bfloat16),  # as under autocast
        (torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_no_tokens_are_kept_for_their_shape(
    dtype: torch.dtype, of_branch: torch.dtype, learnt: bool
) -> None:
    """A residual keeps its sum, and the branch for a gradient of γ: tokens are what memory is."""
    h = torch.randn(3, 10, WIDTH, dtype=dtype, requires_grad=True)
    branch, layer_scale, *norm = others("residual_layer_norm", h)
    branch = branch.to(of_branch)
    layer_scale.requires_grad_(learnt)
    kept: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        total, _ = call("residual_layer_norm", h, branch, layer_scale, *norm)
    needed = [total]
    needed += [branch] if learnt or branch.dtype != total.dtype else []
    needed += [h] if h.dtype != total.dtype else []
    tokens = {tensor.data_ptr() for tensor in kept if tensor.numel() == h.numel()}
    assert tokens == {tensor.data_ptr() for tensor in needed}


@pytest.mark.parametrize("op", SINGLE)
@pytest.mark.parametrize("quick", [True, False])
def test_results_may_be_written_into(op: str, quick: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """As those of torch's own functions: they are no views of anything."""
    x = torch.randn(3, 10, WIDTH, requires_grad=True)
    rest = others(op, x)
    if not quick:
        look_at_all(monkeypatch)
    expected = torch.autograd.grad(sum(y.sum() for y in call(op, x, *rest)), x)
    results = call(op, x, *rest)
    for y in results:
        y.mul_(1)
    if op == "stitch":  # the others' own backward reads their sum or y
        assert torch.equal(*torch.autograd.grad(results[0].sum(), x), *expected)


class Subclass(Tensor):
    """A tensor that may not be what it seems."""


UNUSUAL: dict[str, Callable[[Tensor], object]] = {
    "negation pending": torch._neg_view,
    "unwritten zeros": lambda t: torch._efficientzerotensor(t.shape),
    "some unwritten zeros": lambda t: torch._efficientzerotensor((2 * len(t), *t.shape[1:]))[
        len(t) :
    ],
    "subclass": lambda t: t.as_subclass(Subclass),
    "double": Tensor.double,
    "half": Tensor.half,
    "integers": Tensor.long,
    "meta": lambda t: t.to("meta"),
    "sparse": Tensor.to_sparse,
    "more": lambda t: torch.cat([t, t], -1),
    "fewer dimensions": lambda t: t.flatten() if t.dim() > 1 else t.sum(),
    "no tensor": Tensor.tolist,
    "nothing in it": lambda t: t[:0],
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("unusual", UNUSUAL)
def test_what_is_unusual_is_not_plain(op: str, unusual: str) -> None:
    x = torch.randn(6, 5, WIDTH)
    arguments = [x, *others(op, x)]
    assert is_plain(op, *arguments)
    for i, argument in enumerate(arguments):
        changed = [*arguments[:i], UNUSUAL[unusual](argument), *arguments[i + 1 :]]
        assert not is_plain(op, *changed), i


@pytest.mark.parametrize("unusual", ["negation pending", "unwritten zeros", "some unwritten zeros"])
@pytest.mark.parametrize("op", OPS)
def test_what_is_unusual_is_computed_all_the_same(op: str, unusual: str) -> None:
    x = torch.randn(6, WIDTH)
    rest = others(op, x)
    strange = UNUSUAL[unusual](x)
    for actual, expected in zip(
        call(op, strange, *rest), call(op, strange.clone(), *rest), strict=True
    ):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("number", [1, float("nan"), float("inf"), None, "1e-6"])
def test_unusual_numbers_are_not_plain(number: object) -> None:
    x = torch.randn(3, WIDTH)
    for op in ("residual_layer_norm", "stitch_layer_norm"):
        assert not is_plain(op, x, *others(op, x), eps=number)
        assert not is_plain(op, x, *others(op, x), eps=-1e-6)
    for op in STITCHES:
        assert not is_plain(op, x, *others(op, x), scaling=number)


@pytest.mark.parametrize("op", STITCHES)
def test_half_a_low_rank_part_is_not_plain(op: str) -> None:
    x = torch.randn(3, WIDTH)
    weight, bias, A, B, *norm = others(op, x)
    assert is_plain(op, x, weight, None, None, None, *norm)
    assert not is_plain(op, x, weight, bias, A, None, *norm)
    assert not is_plain(op, x, weight, bias, None, B, *norm)
    assert not is_plain(op, x, None, bias, A, B, *norm)


def test_little_work_is_left_to_others() -> None:
    x, weight, bias = torch.randn(6, 5, WIDTH), torch.randn(OUT, WIDTH), torch.randn(OUT)
    assert native.linear(x, weight, bias, 30 * WIDTH * OUT, 30) is not None
    assert native.linear(x, weight, bias, 30 * WIDTH * OUT + 1, 30) is None
    assert native.linear(x, weight, bias, 30 * WIDTH * OUT, 31) is None


@contextmanager
def exporting() -> Iterator[None]:
    """As torch says of itself while it exports a model without dynamo."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.compiler, "_is_compiling_flag", True)
        yield


CHANGED: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "a mode that dispatches": lambda: FlopCounterMode(display=False),
    "a mode of functions": lambda: torch.device("cpu"),
    "an export": exporting,
}
WATCHED = CHANGED | {
    "a profiler": torch.profiler.profile,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward mode": forward_ad.dual_level,
}


@pytest.mark.parametrize("watched", WATCHED)
@pytest.mark.parametrize("op", OPS)
def test_somebody_watches(op: str, watched: str) -> None:
    x = torch.randn(3, WIDTH)
    rest = others(op, x)
    assert is_plain(op, x, *rest)
    with WATCHED[watched]():
        assert not is_plain(op, x, *rest)
        assert library.is_transformed((x, None, 1.0)) == (watched in CHANGED)
    assert is_plain(op, x, *rest)
    assert not library.is_transformed((x, None, 1.0))


def test_somebody_watches_gradients() -> None:
    x = torch.randn(3, WIDTH)
    parameters = (*others("stitch", x), None, None, 0.5)
    of_a_stitch = torch.randn(3, OUT), None, x, parameters, None, None, None, [True] * 7
    statistics = torch.randn(3), torch.rand(3)
    residual = (x, x, x, *others("residual_layer_norm", x), x, *statistics, [True] * 5)
    for watched in (nullcontext, *WATCHED.values()):
        with watched():
            answers = native.stitch_gradients(*of_a_stitch), native.residual_gradients(*residual)
        assert [done is None for done in answers] == [watched is not nullcontext] * 2


def traced(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.jit.trace(function, x, check_trace=False)


def mapped(function: Callable[[Tensor], Tensor], x: Tensor) -> None:
    torch.func.vmap(function)(x)


@pytest.mark.parametrize("transform", [traced, mapped])
@pytest.mark.parametrize("op", OPS)
def test_inside_a_transform(
    op: str, transform: Callable[[Callable[[Tensor], Tensor], Tensor], None]
) -> None:
    x, answers = torch.randn(3, WIDTH), []
    rest = others(op, x)

    def watched(number: Tensor) -> Tensor:
        answers.append((is_plain(op, x, *rest), library.is_transformed((x, None, 1.0))))
        return number + 1

    transform(watched, torch.randn(2))
    assert answers == [(False, True)]


@pytest.mark.parametrize("op", OPS)
def test_no_kernel_is_tried_where_another_backend_is_forced(op: str) -> None:
    assert tries_kernel(op)
    for backend in ("torch", "triton", "cuda"):  # whether it can run here or not
        with use_backend(backend):
            assert not tries_kernel(op)
    assert tries_kernel(op)


@pytest.mark.parametrize("op", ["residual_layer_norm", "stitch_layer_norm"])
def test_statistics_come_along_for_autograd_alone(op: str) -> None:
    x = torch.randn(3, WIDTH)
    tensors = [x, *others(op, x)]

    def outputs() -> int:
        if op == "residual_layer_norm":
            return len(native.residual_layer_norm(*tensors, 1e-6) or ())
        return len(native.stitch_layer_norm(x, (*tensors[1:], 0.5), 1e-6) or ())

    assert outputs() == 2
    for tensor in tensors:
        tensor.requires_grad_()
        assert outputs() == 4
        with torch.no_grad():
            assert outputs() == 2
        tensor.requires_grad_(False)


@pytest.mark.parametrize("grads", [False, True])
def test_a_norm_needs_an_eps(grads: bool) -> None:
    x = torch.randn(3, WIDTH, requires_grad=grads)
    with pytest.raises(ValueError, match="eps must be a finite number of at least 0"):
        stitch_layer_norm(x, torch.randn(OUT, WIDTH), eps=None)


@pytest.mark.parametrize("op", [op for op in OPS if op != "linear"])
def test_compiled_code_does_not_ask_for_the_backend(
    op: str, recwarn: pytest.WarningsRecorder
) -> None:
    torch.compiler.reset()
    x = torch.randn(6, WIDTH)
    compiled = torch.compile(lambda *arguments: call(op, *arguments), backend="eager")
    rest = others(op, x)
    for actual, expected in zip(compiled(x, *rest), call(op, x, *rest), strict=True):
        assert torch.equal(actual, expected)
    assert not [w for w in recwarn if "lru_cache" in str(w.message)]
