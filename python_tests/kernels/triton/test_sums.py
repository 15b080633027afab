import pytest
import torch
from judge import assert_as_exact_as_torch

from snkernels.kernels.triton.sums import column_sums, sum_rows


@pytest.mark.parametrize(
    ("rows", "width", "chunk"), [(1, 1, 1), (5, 3, 1), (100, 130, 34), (67, 5, 40), (0, 4, 0)]
)
def test_sums_of_chunks(rows: int, width: int, chunk: int) -> None:
    """The last chunk has fewer rows, and the only one of no rows has none."""
    matrix = torch.randn(rows, width)
    sums = sum_rows(matrix, chunk, torch.float32)
    parts = matrix.split(chunk)
    assert sums.shape == (len(parts), width)
    for i, part in enumerate(parts):
        assert_as_exact_as_torch(str(i), sums[i], part.sum(0), part.double().sum(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_column_sums_of_a_strided_matrix(dtype: torch.dtype) -> None:
    matrix = torch.randn(140, 300).to(dtype).t()[::2]
    exact = matrix.double().sum(0)
    assert_as_exact_as_torch("sums", column_sums(matrix, dtype), matrix.sum(0), exact)


def test_column_sums_of_more_rows_than_one_pass_takes() -> None:
    matrix = torch.randn(5000, 3) + 1
    assert_as_exact_as_torch(
        "sums", column_sums(matrix, torch.float32), matrix.sum(0), matrix.double().sum(0)
    )
