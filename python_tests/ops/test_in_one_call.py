"""Ops that the compiled module computes by one call: the same bits, and never what is unusual."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import torch
from device import DEVICE
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import FlopCounterMode

from snkernels.backends import use_backend
from snkernels.kernels import native
from snkernels.ops import linear, residual_layer_norm
from snkernels.ops.library import in_one_call

pytestmark = pytest.mark.skipif(DEVICE != "cpu", reason="is about CPU memory")

WIDTH = 40
OPS = ["linear", "residual_layer_norm"]


@pytest.fixture(autouse=True)
def _cpu_backend() -> Iterator[None]:
    assert native.IMPORT_ERROR is None, native.IMPORT_ERROR
    with use_backend("cpu"):
        yield


def others(op: str, x: Tensor) -> list[Tensor | None]:
    if op == "linear":
        return [torch.randn(24, WIDTH), torch.randn(24)]
    return [torch.randn(x.shape), torch.randn(WIDTH), torch.randn(WIDTH), torch.randn(WIDTH)]


def call(op: str, x: Tensor, *rest: Tensor | None) -> tuple[Tensor, ...]:
    """By the public op."""
    if op == "linear":
        return (linear(x, *rest),)
    branch, layer_scale, *norm = rest
    return residual_layer_norm(x, branch, layer_scale, None, *norm)


def at_once(op: str, x: Tensor, *rest: Tensor | None, eps: object = 1e-6) -> tuple[Tensor, ...]:
    """By the compiled module alone: nothing if it wants a closer look."""
    if op == "linear":
        y = native.linear(x, *rest, 0, 0)
        return () if y is None else (y,)
    fits = native.fits_residual_layer_norm(x, *rest, eps)
    return native.residual_layer_norm(x, *rest, eps) if fits else ()


TOKENS: dict[str, Callable[[], Tensor]] = {
    "one": lambda: torch.randn(WIDTH),
    "rows": lambda: torch.randn(30, WIDTH),
    "images": lambda: torch.randn(3, 10, WIDTH),
    "class tokens": lambda: torch.randn(3, 10, WIDTH)[:, :1],
    "some features": lambda: torch.randn(3, 10, 2 * WIDTH)[..., ::2],
    "four dimensions": lambda: torch.randn(2, 1, 3, 5, WIDTH)[..., :1, :],
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("isa", native._C.cpu_isas() if native._C else [])
@pytest.mark.parametrize("tokens", TOKENS)
def test_it_has_the_bits_of_the_op(
    op: str, isa: str, tokens: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    x = TOKENS[tokens]()
    rest = others(op, x)
    before = native._C.cpu_isa()
    native._C.cpu_use_isa(isa)
    try:
        for given in (rest, [*rest[:-1], None]):
            learned = call(op, x.detach().clone().requires_grad_(), *given)
            for results in (at_once(op, x, *given), call(op, x.detach(), *given)):
                assert len(results) == len(learned)
                for actual, expected in zip(results, learned, strict=True):
                    assert actual.is_contiguous()
                    assert torch.equal(actual, expected)
    finally:
        native._C.cpu_use_isa(before)


def never(op: str, x: Tensor) -> bool:
    return False


class Subclass(Tensor):
    """A tensor that may not be what it seems."""


UNUSUAL: dict[str, Callable[[Tensor], Tensor]] = {
    "negation pending": torch._neg_view,
    "unwritten zeros": lambda t: torch._efficientzerotensor(t.shape),
    "subclass": lambda t: t.as_subclass(Subclass),
    "double": Tensor.double,
    "half": Tensor.half,
    "integers": Tensor.long,
    "meta": lambda t: t.to("meta"),
    "sparse": Tensor.to_sparse,
    "more": lambda t: torch.cat([t, t], -1),
    "fewer dimensions": lambda t: t.flatten() if t.dim() > 1 else t.sum(),
    "no tensor": lambda t: t.tolist(),
    "nothing in it": lambda t: t[:0],
}


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("unusual", UNUSUAL)
def test_what_is_unusual_gets_a_closer_look(op: str, unusual: str) -> None:
    x = torch.randn(6, 5, WIDTH)
    arguments = [x, *others(op, x)]
    assert at_once(op, *arguments)
    for i, argument in enumerate(arguments):
        if i == 0 and op == "linear" and unusual == "fewer dimensions":
            continue  # it has too many features then, as "more" has
        changed = [*arguments[:i], UNUSUAL[unusual](argument), *arguments[i + 1 :]]
        assert at_once(op, *changed) == (), i


def test_rows_that_are_not_equally_far_apart_get_a_closer_look() -> None:
    x = torch.randn(5, 6, WIDTH).transpose(0, 1)
    for op in OPS:
        rest = others(op, x)
        assert at_once(op, x, *rest) == ()
        for actual, expected in zip(
            call(op, x, *rest), call(op, x.contiguous(), *rest), strict=True
        ):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("eps", [1, -1e-6, float("nan"), float("inf"), None, "1e-6"])
def test_an_unusual_eps_gets_a_closer_look(eps: object) -> None:
    x = torch.randn(3, WIDTH)
    assert at_once("residual_layer_norm", x, *others("residual_layer_norm", x), eps=eps) == ()


def test_little_work_is_left_to_others() -> None:
    x, weight, bias = torch.randn(6, 5, WIDTH), torch.randn(24, WIDTH), torch.randn(24)
    assert native.linear(x, weight, bias, 30 * WIDTH * 24, 30) is not None
    assert native.linear(x, weight, bias, 30 * WIDTH * 24 + 1, 30) is None
    assert native.linear(x, weight, bias, 30 * WIDTH * 24, 31) is None


WATCHED: dict[str, Callable[[], AbstractContextManager[object]]] = {
    "a mode": lambda: FlopCounterMode(display=False),
    "a profiler": torch.profiler.profile,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "forward mode": forward_ad.dual_level,
    "another backend": lambda: use_backend("torch"),
}


@pytest.mark.parametrize("watched", WATCHED)
def test_where_somebody_watches_it_is_not_one_call(watched: str) -> None:
    x = torch.randn(3, WIDTH)
    for op in OPS:
        for context in (nullcontext, WATCHED[watched]):
            with context():
                assert in_one_call(op, x) == (context is nullcontext)
    assert not in_one_call("linear", x.as_subclass(Subclass))
    assert not in_one_call("linear", x.tolist())
    assert not in_one_call("linear", x.to("meta"))

    def of_a_batch(x: Tensor) -> Tensor:
        assert not in_one_call("linear", x)
        return x

    torch.func.vmap(of_a_batch)(x)
