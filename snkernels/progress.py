"""The progress bar of everything that takes long."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def progress_bar(items: Iterable[T], name: str, show: bool = True) -> Iterable[T]:
    """Pass items on, with a bar of done, rate and remaining time on standard error.

    The bar appears after two seconds, only on a terminal, and only where tqdm is installed.

    Args:
        items: What to pass on; the remaining time is known where they have a length.
        name: What the bar is called.
        show: False passes the items on as they are.
    """
    if not show:
        return items
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=name, delay=2, disable=None, leave=False)
