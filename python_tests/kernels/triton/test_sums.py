import itertools

import pytest
import torch
from judge import assert_as_exact_as_torch
from torch import Tensor

from snkernels.kernels.triton import configs
from snkernels.kernels.triton.groups import Groups
from snkernels.kernels.triton.sums import column_sums


def judge(matrix: Tensor, sizes: list[int], dtype: torch.dtype) -> None:
    offsets = [0, *itertools.accumulate(sizes)]
    nothing = [None] * (6 * len(sizes))
    groups = Groups(matrix, offsets, nothing, [1.0] * len(sizes), matrix.shape[1])
    sums = column_sums(matrix, dtype, groups)
    assert sums.shape == (len(sizes), matrix.shape[1])
    for i, own in enumerate(matrix.split(sizes)):
        assert_as_exact_as_torch(str(i), sums[i], own.sum(0), own.double().sum(0))


@pytest.mark.parametrize("sizes", [[1], [100], [7, 0, 60, 33], [0, 0, 5]], ids=str)
def test_sums_of_groups(sizes: list[int]) -> None:
    """In chunks that end within a group or with it; a group without rows has sums of zero."""
    with configs.override("sum_rows", BLOCK_M=16, BLOCK_N=64):
        judge(torch.randn(sum(sizes), 130), sizes, torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_sums_of_a_strided_matrix(dtype: torch.dtype) -> None:
    judge(torch.randn(140, 300).to(dtype).t()[::2], [100, 50], dtype)


def test_sums_of_more_rows_than_one_pass_takes() -> None:
    judge(torch.randn(5000, 100) + 1, [4990, 10], torch.float32)
