"""Weights that hold their low-rank part."""

import itertools
from typing import Any

import pytest
import torch
from judge import assert_as_exact_as_torch
from torch import Tensor

from snkernels.kernels.triton import configs, launch
from snkernels.kernels.triton.groups import Groups
from snkernels.kernels.triton.merge import merged_of_groups
from snkernels.kernels.triton.multi_stitch import project

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def make(n: int, k: int, rank: int, dtype: torch.dtype) -> list[Tensor]:
    shapes = ((n, k), (rank, k), (n, rank))
    return [(torch.randn(shape) * shape[1] ** -0.5).to(dtype) for shape in shapes]


def judge(name: str, actual: Tensor, parameters: list[Tensor], scaling: float) -> None:
    def eager(dtype: torch.dtype) -> Tensor:
        weight, lora_A, lora_B = (parameter.to(dtype) for parameter in parameters)
        return weight + scaling * (lora_B @ lora_A)

    assert_as_exact_as_torch(name, actual, eager(actual.dtype), eager(torch.float64))


def merged(dtype: torch.dtype, groups: list[list[Tensor]], scalings: list[float]) -> list[Tensor]:
    """W' of each group's W, A and B, in tokens' dtype; by a projection of the identity."""
    n, k = groups[0][0].shape
    x = torch.eye(k, dtype=dtype).repeat(len(groups), 1)
    offsets = [i * k for i in range(len(groups) + 1)]
    tensors = [p for w, a, b in groups for p in (w, None, a, b, None, None)]
    table = Groups(x, offsets, tensors, scalings, n)
    y = torch.empty(len(x), n, dtype=dtype)
    project(table, x, y, merged_of_groups(table, x, transposed=True))
    return [own.t() for own in y.split(k)]


@pytest.mark.usefixtures("right_bf16")
@pytest.mark.parametrize(("dtype", "own"), list(itertools.product(DTYPES, DTYPES)), ids=str)
def test_every_dtype(dtype: torch.dtype, own: torch.dtype) -> None:
    groups, scalings = [make(70, 90, 20, own) for _ in range(2)], [0.5, 2.0]
    for whole, *given in zip(merged(dtype, groups, scalings), groups, scalings, strict=True):
        judge("W", whole, *given)


@pytest.mark.parametrize("rank", [1, 3, 16, 65, 128, 130])
def test_ranks_and_edges(rank: int) -> None:
    """Several tiles in both directions, and of ranks, with a rest; all strides."""
    groups, scalings = [make(33, 49, rank, torch.float32) for _ in range(2)], [2.0, 0.5]
    transposed = [[parameter.t().contiguous().t() for parameter in own] for own in groups]
    with configs.override("merge", BLOCK_N=16, BLOCK_K=16, BLOCK_R=16):
        by_rows = merged(torch.float32, groups, scalings)
        by_columns = merged(torch.float32, transposed, scalings)
    for whole, other, *given in zip(by_rows, by_columns, groups, scalings, strict=True):
        assert torch.equal(whole, other)
        judge("W", whole, *given)


def launches_of(tensors: list[Tensor | None], x: Tensor) -> int:
    launches: list[Any] = []
    groups = Groups(x, [0, 3, 6], tensors, [1.0, 1.0], 8)
    with launch.launches_go_to(lambda *launched: launches.append(launched)):
        merged_of_groups(groups, x)
    return len(launches)


def test_nothing_is_launched_where_nothing_changes() -> None:
    x, weight = torch.randn(6, 8), torch.randn(8, 8)
    one, low_rank = [weight, *[None] * 5], [weight, None, torch.ones(2, 8), torch.ones(8, 2)]
    identity = [None] * 6
    assert launches_of([*one, *one], x) == launches_of([*one, *identity], x) == 0
    assert launches_of([*identity, *identity], x) == 0
    assert launches_of([*one, *low_rank, None, None], x) == 1
    assert launches_of([*one, *one], x.half()) == 1


@pytest.mark.parametrize("transposed", [False, True])
def test_groups_of_all_kinds(transposed: bool) -> None:
    """Low rank, lower rank, none, and the identity; weights of no whole 16 bytes."""
    full, lower = make(7, 7, 20, torch.float16), make(7, 7, 3, torch.float16)
    alone = make(7, 7, 1, torch.float16)[:1]
    groups = [full, lower, alone, []]
    tensors: list[Tensor | None] = []
    for own in groups:
        weight, lora_A, lora_B = own + [None] * (3 - len(own))
        tensors += [weight, None, lora_A, lora_B, None, None]
    x = torch.eye(7).half().repeat(4, 1)
    table = Groups(x, [0, 7, 14, 21, 28], tensors, [0.5, 2.0, 3.0, 4.0], 7)
    weights = merged_of_groups(table, x, transposed=transposed)
    got = project(table, x, torch.empty(28, 7).half(), weights).split(7)
    whole = [g.t() if transposed else g for g in got]
    judge("full", whole[0], full, 0.5)
    judge("lower", whole[1], lower, 2.0)
    assert torch.equal(whole[2], alone[0])
    assert torch.equal(whole[3], x[:7])
