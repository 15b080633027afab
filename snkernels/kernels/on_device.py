"""Integers that the host knows, as tensors in a GPU's memory: group offsets, tables of pointers.

No call waits for a GPU, nor does the GPU wait for a copy where it has the integers already: they
are kept by value, so that a repeated call, and a graph that is captured after one, finds them in
place. A parameter that moves makes another table, as its address is among the values.
"""

from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

MOST_KEPT = 256

NOT_WARM = (
    "a call to be captured in a graph must have run once before, with the very same parameters "
    "and, where they are in CPU memory, group offsets"
)


@dataclass
class _Kept:
    integers: Tensor
    stream: torch.cuda.Stream
    copied: torch.cuda.Event
    in_a_graph: bool = False


_kept: OrderedDict[tuple[tuple[int, ...], torch.device], _Kept] = OrderedDict()


@torch.inference_mode(False)  # a tensor made in inference could not be used in training
def on_device(values: tuple[int, ...], device: torch.device) -> Tensor:
    """An int64 tensor of ``values`` that must not be written to.

    Raises:
        RuntimeError: a graph is being captured, and no call before needed these values.
    """
    if device.type != "cuda":
        return torch.tensor(values, dtype=torch.int64, device=device)
    capturing = torch.cuda.is_current_stream_capturing()
    stream = torch.cuda.current_stream(device)
    kept = _kept.get((values, device))
    if kept is None:
        if capturing:
            raise RuntimeError(NOT_WARM)
        # Pinned memory goes back to its allocator, which waits for the copy before it is reused.
        host = torch.tensor(values, dtype=torch.int64, pin_memory=True)
        integers = host.to(device, non_blocking=True)
        kept = _kept[values, device] = _Kept(integers, stream, stream.record_event())
        _forget()
    elif capturing:
        # Captures begin by waiting for all earlier work, and replays need the memory for good.
        kept.in_a_graph = True
    elif stream != kept.stream:
        stream.wait_event(kept.copied)
        kept.integers.record_stream(stream)
    _kept.move_to_end((values, device))
    return kept.integers


def _forget() -> None:
    """Drops what was not used for longest, but nothing that a graph reads."""
    excess = len(_kept) - MOST_KEPT
    for key in [key for key, kept in _kept.items() if not kept.in_a_graph][: max(0, excess)]:
        del _kept[key]
