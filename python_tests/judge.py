"""How a kernel is judged: against torch in the same dtype, both measured against fp64.

The rule calibrates itself, where a table of tolerances would hide faults.
"""

import torch
from torch import Tensor


def error(actual: Tensor, exact: Tensor) -> float:
    """Root mean square of the difference; infinite where a value is missing or not finite."""
    difference = actual.double() - exact
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    return difference.square().mean().sqrt().item() if difference.numel() else 0.0


def worst(actual: Tensor, exact: Tensor) -> float:
    """The largest difference."""
    return (actual.double() - exact).abs().max().item() if exact.numel() else 0.0


def assert_as_exact_as_torch(name: str, actual: Tensor, eager: Tensor, exact: Tensor) -> None:
    """Error at most twice torch's, plus one rounding of a typical value.

    The floor is for results that torch happens to get exactly right, as sums of few terms. One
    wrong value among many would hide in a mean: the worst one may be off four times as far as
    torch's, plus one rounding of the largest value.
    """
    assert actual.shape == exact.shape, (name, actual.shape, exact.shape)
    typical = exact.square().mean().sqrt().item() if exact.numel() else 0.0
    rounding = torch.finfo(actual.dtype).eps
    ours, theirs = error(actual, exact), error(eager, exact)
    assert ours <= 2 * theirs + rounding * typical / 4, (
        f"{name}: error {ours:.3g}, torch {theirs:.3g}"
    )
    largest = exact.abs().max().item() if exact.numel() else 0.0
    ours, theirs = worst(actual, exact), worst(eager, exact)
    assert ours <= 4 * theirs + rounding * largest, f"{name}: worst {ours:.3g}, torch {theirs:.3g}"
