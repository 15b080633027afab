"""Rows in groups, each with its own parameters: how kernels find them, and the table they look in.

Tiles of rows never cross groups. A program finds its group and rows by a search over the offsets in
device memory, and then the addresses of the group's parameters in a table, so nothing is stacked,
the grid follows from sizes that the host knows, and the call does not wait for the GPU. Offsets are
clamped to the rows of x: wrong ones give wrong results, and never a fault.

All groups of a call share the dtype and strides of a parameter, which the launches take as
arguments. Where groups differ there, or in rank, that parameter is copied, as fp32 if dtypes do;
such a call cannot be captured in a graph, as copies have new addresses each time.
"""

import struct
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from snkernels.kernels.on_device import NOT_WARM, on_device
from snkernels.kernels.triton.operands import Operand, operand

WEIGHT, BIAS, LORA_A, LORA_B, NORM_WEIGHT, NORM_BIAS = range(6)
_SEARCH = tl.constexpr(128)  # offsets at a time


class Parameter(NamedTuple):
    """A parameter that each group has one of.

    Attributes:
        one: that of any group, for dtype and strides.
        table: the address of each group's; 0 where it has none.
    """

    one: Operand
    table: Any


@triton.jit
def bounds(p_offsets, group, M):
    """Makes (start, end) of a group's rows, within those of x."""
    start = tl.load(p_offsets + group)
    end = tl.load(p_offsets + (group + 1))
    return tl.minimum(tl.maximum(start, 0), M), tl.minimum(tl.maximum(end, 0), M)


@triton.jit
def find(p_offsets, groups, M, tile, size):
    """Makes (group, first row, end) of a tile of at most ``size`` rows; first ≥ end if of none.

    Group g has the tiles from offsets[g] // size + g on, to where the next one's begin. Those are
    enough wherever its rows lie, and the host knows how many there are in all: M // size + groups.
    """
    M = tl.cast(M, tl.int64)
    tile = tl.cast(tile, tl.int64)
    begun = tl.zeros([_SEARCH], tl.int32)
    for first in range(0, groups, _SEARCH):
        o_g = first + tl.arange(0, _SEARCH).to(tl.int64)
        start = tl.load(p_offsets + o_g, mask=o_g < groups, other=0)
        start = tl.minimum(tl.maximum(start, 0), M)
        begun += ((o_g < groups) & (start // size + o_g <= tile)).to(tl.int32)
    group = tl.maximum(tl.sum(begun, 0) - 1, 0).to(tl.int64)
    start, end = bounds(p_offsets, group, M)
    row = start + (tile - start // size - group) * size
    # Of offsets that do not rise, a tile may come to lie before its group.
    return group, tl.where(row < start, end, row), end


@triton.jit
def rows_of(p_offsets, groups, M, tile, size):
    """Makes what :func:`find` does; without offsets, of one group of all rows. tile is int64."""
    if p_offsets is None:
        return tl.cast(0, tl.int64), tile * size, tl.cast(M, tl.int64)
    else:
        return find(p_offsets, groups, M, tile, size)


@triton.jit
def lacks(parameter, group):
    """Whether a group has no such parameter, while others have."""
    return tl.load(parameter.table + group) == 0


@triton.jit
def of_group(parameter, group):
    """A group's own parameter as an operand, which it must have; None where no group has one."""
    # Without a return for that: Triton 3.6 can compile neither one of None nor None in a tuple.
    if parameter is not None:
        address = tl.load(parameter.table + group).to(parameter.one.data.dtype)
        return Operand(tl.multiple_of(address, 16), parameter.one.strides)


class Groups:
    """What the launches of a call share: offsets and parameters of its groups."""

    def __init__(
        self,
        x: Tensor,
        group_offsets: Tensor | list[int],
        tensors: Sequence[Tensor | None],
        scalings: Sequence[float],
        features: int,
    ) -> None:
        self.rows, self.count = x.shape[0], len(scalings)
        if isinstance(group_offsets, list):
            self.offsets = on_device(tuple(group_offsets), x.device)
        else:
            self.offsets = group_offsets.contiguous()
        roles = [list(tensors[i::6]) for i in range(6)]
        self.rank = max(0 if a is None else a.shape[0] for a in roles[LORA_A])
        self.has_identity = any(weight is None for weight in roles[WEIGHT])
        for role, value in ((BIAS, 0.0), (NORM_WEIGHT, 1.0), (NORM_BIAS, 0.0)):
            _fill_in(roles[role], value, features)
        # Copies live as long as the call: until its launches are in the stream.
        self._parameters = [_alike(role) for role in roles]
        table = [[0 if p is None else p.data_ptr() for p in role] for role in self._parameters]
        table += [[struct.unpack("q", struct.pack("d", s))[0] for s in scalings]]
        # Rows of whole 16 bytes, or what was compiled would depend on the number of groups.
        padding = [0] * (self.count % 2)
        values = tuple(value for row in table for value in (*row, *padding))
        *self._tables, bits = on_device(values, x.device).view(len(table), -1).unbind()
        self.scalings = bits.view(torch.float64)

    def one(self, role: int) -> Tensor | None:
        """Any group's tensor, for dtype and strides; None where no group has one."""
        return next((p for p in self._parameters[role] if p is not None), None)

    def parameter(self, role: int, transposed: bool = False) -> Parameter | None:
        """A role for a kernel; None where no group has it."""
        one = operand(self.one(role), transposed)
        return None if one is None else Parameter(one, self._tables[role])

    def tiles(self, size: int) -> int:
        """How many tiles of ``size`` rows are enough for the groups, wherever they begin."""
        return self.rows // size + self.count


def in_chunks(rows: int, size: int, groups: Groups | None) -> tuple[int, Tensor | None, int]:
    """How many chunks of ``size`` rows there are, and what :func:`rows_of` finds them by.

    Without groups there is one chunk at least, and none is empty unless there are no rows.
    """
    if groups is None:
        return max(1, -(-rows // max(1, size))), None, 1
    return groups.tiles(size), groups.offsets, groups.count


def _fill_in(role: list[Tensor | None], value: float, features: int) -> None:
    """Gives the groups that lack a vector one that changes nothing, if others have it."""
    one = next((vector for vector in role if vector is not None), None)
    if one is None:
        return
    role[:] = [_constant(value, features, one.dtype, one.device) if v is None else v for v in role]


_constants: dict[tuple[float, int, torch.dtype, torch.device], Tensor] = {}


def _constant(value: float, features: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Kept for good, as its address is in tables that are kept."""
    key = value, features, dtype, device
    if key not in _constants:
        on_gpu = device.type == "cuda"
        if on_gpu and torch.cuda.is_current_stream_capturing():
            raise RuntimeError(NOT_WARM)  # it would be filled by replays alone
        _constants[key] = torch.full((features,), value, dtype=dtype, device=device)
        if on_gpu:  # once for good: other streams will read it without an event
            torch.cuda.current_stream(device).synchronize()
    return _constants[key]


def _alike(role: list[Tensor | None]) -> list[Tensor | None]:
    """A role's tensors if they agree in all that launches say of them, or else copies that do.

    Those of a lower rank come to the highest by zeros.
    """
    present = [tensor for tensor in role if tensor is not None]
    dtypes = {tensor.dtype for tensor in present}
    layouts = {(tensor.shape, tensor.stride()) for tensor in present}
    if len(dtypes) <= 1 and len(layouts) <= 1 and not any(t.data_ptr() % 16 for t in present):
        return role
    dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
    shape = [max(sizes) for sizes in zip(*(tensor.shape for tensor in present), strict=True)]

    def copy(tensor: Tensor) -> Tensor:
        whole = torch.zeros(shape, dtype=dtype, device=tensor.device)
        whole[tuple(map(slice, tensor.shape))] = tensor
        return whole

    return [None if tensor is None else copy(tensor) for tensor in role]
