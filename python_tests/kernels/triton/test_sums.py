import pytest
import torch
from judge import assert_as_exact_as_torch

from snkernels.kernels.triton.sums import column_sums, sum_rows


@pytest.mark.parametrize(
    ("rows", "width", "chunks"), [(1, 1, 1), (5, 3, 16), (100, 130, 3), (67, 5, 2), (0, 4, 1)]
)
def test_sums_of_chunks(rows: int, width: int, chunks: int) -> None:
    """Chunks are equal but for the last ones, which are shorter or empty."""
    matrix = torch.randn(rows, width)
    per_chunk = -(-rows // chunks)
    sums = sum_rows(matrix, chunks, torch.float32)
    assert sums.shape == (chunks, width)
    for i in range(chunks):
        part = matrix[i * per_chunk : (i + 1) * per_chunk]
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
