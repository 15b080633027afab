"""The training flags of modules: who runs a model for ends of its own leaves them as they were."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

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
