"""What the processes of ``torch.distributed`` do together; alone, a process does it by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


def distributed() -> bool:
    """Whether this process belongs to a process group."""
    return dist.is_available() and dist.is_initialized()


def rank() -> int:
    """Return the rank of this process in the default group, 0 without one."""
    return dist.get_rank() if distributed() else 0


def world_size() -> int:
    """Return the number of processes in the default group, 1 without one."""
    return dist.get_world_size() if distributed() else 1


@contextmanager
def agreed() -> Iterator[None]:
    """Let a ``with`` block on every rank either succeed everywhere or raise everywhere.

    So an error on one rank leaves no other waiting in a later collective operation.  The block must
    not hold one itself.  It does not catch what ends a process, such as an interrupt or a signal;
    a launcher such as torchrun then ends the others.

    Raises:
        RuntimeError: If the block failed on another rank only; the message names it and the error.
    """
    if not distributed():
        yield
        return
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    messages = gather(None if failure is None else f"{type(failure).__name__}: {failure}")
    if failure is not None:
        raise failure
    for other, message in enumerate(messages):
        if message is not None:
            raise RuntimeError(f"rank {other} failed: {message}")


def gather(value: T) -> list[T]:
    """Return the values of all ranks, which must be picklable, in the order of ranks."""
    if not distributed():
        return [value]
    values = [value] * world_size()
    dist.all_gather_object(values, value)
    return values


def all_gather(tensor: Tensor) -> list[Tensor]:
    """Return the tensors of all ranks, of one shape and dtype, in the order of ranks."""
    if not distributed():
        return [tensor]
    parts = [torch.empty_like(tensor) for _ in range(world_size())]
    dist.all_gather(parts, tensor)
    return parts


@torch.no_grad()
def broadcast(tensors: Iterable[Tensor]) -> None:
    """Give the tensors of all ranks the values of rank 0."""
    if not distributed():
        return
    for tensor in tensors:
        # A copy may be of any layout, and counts as a change of the tensor, for what is cached.
        values = tensor.clone(memory_format=torch.contiguous_format)
        dist.broadcast(values, src=0)
        tensor.copy_(values)
