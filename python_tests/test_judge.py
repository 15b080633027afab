import pytest
import torch
from judge import assert_as_exact_as_torch


def test_what_is_as_exact_as_torch_passes() -> None:
    exact = torch.randn(100, 100, dtype=torch.float64)
    eager = exact.float() + 1e-5 * torch.randn(100, 100)
    assert_as_exact_as_torch("x", exact.float() + 1e-5 * torch.randn(100, 100), eager, exact)


@pytest.mark.parametrize("wrong", [1e-3, float("nan"), float("inf")])
def test_one_wrong_value_among_many_does_not(wrong: float) -> None:
    exact = torch.randn(100, 100, dtype=torch.float64)
    eager = exact.float() + 1e-5 * torch.randn(100, 100)
    actual = exact.float()
    actual[3, 5] += wrong
    with pytest.raises(AssertionError, match="x"):
        assert_as_exact_as_torch("x", actual, eager, exact)


def test_small_errors_everywhere_do_not() -> None:
    exact = torch.randn(100, 100, dtype=torch.float64)
    eager = exact.float() + 1e-6 * torch.randn(100, 100)
    with pytest.raises(AssertionError, match="error"):
        assert_as_exact_as_torch("x", exact.float() + 3e-6 * torch.randn(100, 100), eager, exact)
