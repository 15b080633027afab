"""Matrices and vectors as kernels take them: memory and strides in one argument."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Operand(NamedTuple):
    """A tensor of any strides.

    Attributes:
        data: the tensor; in a kernel, the address of its first element.
        strides: one for each dimension, in elements.
    """

    data: Any
    strides: tuple[int, ...]


def operand(tensor: Tensor | None, transposed: bool = False) -> Operand | None:
    """A tensor or its transpose for a kernel; None for an absent one."""
    if tensor is None:
        return None
    strides = tensor.stride()
    return Operand(tensor, strides[::-1] if transposed else strides)


@triton.jit
def at(matrix, rows, columns):
    """The addresses of rows × columns of a matrix, both int64."""
    return matrix.data + rows[:, None] * matrix.strides[0] + columns[None, :] * matrix.strides[1]


@triton.jit
def store_tile(p_out, tile, rows, columns, M, N):
    """Stores rows × columns of an (M, N) matrix whose rows adjoin, in its dtype."""
    mask = (rows[:, None] < M) & (columns[None, :] < N)
    p_tile = p_out + rows[:, None] * N + columns[None, :]
    tl.store(p_tile, tile.to(p_out.dtype.element_ty), mask=mask)
