"""How a model is run for a while: in eval mode, without gradients; then all is as it was."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def restored_modes(module: nn.Module) -> Iterator[None]:
    """Put all modules, after the ``with`` block, into the mode that each one is in before it."""
    modes = [(child, child.training) for child in module.modules()]
    try:
        yield
    finally:
        for child, training in modes:
            child.training = training


@contextmanager
def eval_mode(module: nn.Module) -> Iterator[None]:
    """Put all modules in eval mode, and after the ``with`` block into the mode each one was in."""
    with restored_modes(module):
        module.eval()
        yield


@contextmanager
def inference(module: nn.Module, device: str) -> Iterator[None]:
    """Measure a model: in eval mode and inference mode, whatever the caller's own modes are."""
    with eval_mode(module), torch.inference_mode(), uncached_autocast(device):
        yield


@contextmanager
def uncached_autocast(device: str) -> Iterator[None]:
    """Keep autocast as it is, but for its cache of weights that it has cast.

    What is cast without gradients must not be taken for a cast with them later, and a graph must
    cast anew at each replay, not read casts that are gone.
    """
    if not torch.is_autocast_enabled(device):
        yield
        return
    dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, dtype=dtype, cache_enabled=False):
        yield


@contextmanager
def no_grad(device: str) -> Iterator[None]:
    """Run without gradients what lies, under autocast, between things that run with them."""
    with torch.no_grad(), uncached_autocast(device):
        yield
