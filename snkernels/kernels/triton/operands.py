"""Matrices and vectors as kernels take them: memory and strides in one argument."""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor


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


def described(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor | None:
    """What TMA needs to load tiles of rows × columns; None where it cannot.

    It takes a chip from compute capability 9.0 on, columns that adjoin, rows that begin at
    multiples of 16 bytes and do not overlap, and sizes of 31 bits. Outside of the matrix it finds
    zeros. The launch encodes it, so it is that launch's own, and captured with it.
    """
    device = matrix.device
    if device.type == "cuda" and (
        torch.version.hip or torch.cuda.get_device_capability(device) < (9, 0)
    ):
        return None
    step, adjoining = matrix.stride()
    if (
        adjoining != 1
        or step < matrix.shape[1]
        or step * matrix.itemsize % 16
        or matrix.data_ptr() % 16
        or matrix.numel() == 0
        or max(matrix.shape) >= 1 << 31
    ):
        return None
    return TensorDescriptor(matrix, list(matrix.shape), [step, 1], [rows, columns])


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
