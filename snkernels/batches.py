"""Batches of labelled images: which of them a process measures, and whether they are the same."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset

from snkernels import collectives

_SAME = "loader must give the same batches each time and on all ranks"


@dataclass(frozen=True)
class Tally:
    """What one batch gave.

    Attributes:
        batch: Its number among the batches of the loader, from 0.
        images: Number of its images.
        labels: Digest of its labels.
        top1: Per route, images classified right.
        top5: Per route, images whose class is among the five best.
        loss: Per route, sum of the cross-entropy over the images.
    """

    batch: int
    images: int
    labels: str
    top1: list[int]
    top5: list[int]
    loss: list[float]


class Share:
    """The batches that this process measures: of those not measured before, by turns of the ranks.

    Of an ordered loader only these are loaded, and the first one that was measured before.  Of any
    other loader all batches are read.  The labels of what is read but not measured here must be
    those that were measured before or elsewhere.

    Args:
        loader: Batches that begin with images and labels.
        order: What ``batch_order`` gave for it.
        classes: Number of classes of the labels.
        done: The batches that were measured, by number; the caller adds those of all ranks.
        whole: Whether those are all batches.
    """

    def __init__(
        self,
        loader: Iterable[Sequence[Any]],
        order: Sequence[Any] | None,
        classes: int,
        done: Mapping[int, Tally],
        whole: bool,
    ) -> None:
        self._loader, self._order, self._classes = loader, order, classes
        self._done, self._whole = done, whole
        self._before = frozenset(done)
        self._rank, self._ranks = collectives.rank(), collectives.world_size()
        self._passed: dict[int, str] = {}
        # How many batches the loader has; of one without an order, as far as it was read.
        self._count = len(order) if order is not None else len(done) if whole else 0

    def __len__(self) -> int:
        """Number of batches to measure here; a TypeError where the loader has no length."""
        batches: Any = self._loader if self._order is None else self._order
        return len(range(self._rank, len(batches) - len(self._before), self._ranks))

    def __iter__(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Yield number, images and labels of each batch to measure here."""
        for index, batch, mine in self._read():
            images, labels = checked(batch, self._classes)
            if mine:
                yield index, images, labels
            else:
                self._passed[index] = digest([labels])

    def _read(self) -> Iterator[tuple[int, Sequence[Any], bool]]:
        """Yield number, batch, and whether it is to be measured here, of all that must be read."""
        if self._order is None:
            turn = 0
            for index, batch in enumerate(islice(self._loader, 1 if self._whole else None)):
                self._count = max(self._count, index + 1)
                fresh = index not in self._before
                yield index, batch, fresh and turn % self._ranks == self._rank
                turn += fresh
        else:
            fresh_ones = [index for index in range(len(self._order)) if index not in self._before]
            read = [*sorted(self._before)[:1], *fresh_ones[self._rank :: self._ranks]]
            batches = _only(self._loader, [self._order[index] for index in read])
            for index, batch in zip(read, batches, strict=True):
                yield index, batch, index not in self._before

    def compare(self) -> None:
        """Compare the batches that were passed over with those that are done.

        Raises:
            ValueError: If labels differ; the message names the batch.
        """
        for index in self._passed.keys() & self._done.keys():
            if self._passed.pop(index) != self._done[index].labels:
                raise ValueError(f"{_SAME}, but other labels in batch {index} were measured")

    def close(self) -> None:
        """Check that all batches are done, and no others.

        Raises:
            ValueError: If there are no batches, or others were done.
        """
        self.compare()
        if self._count == 0:
            raise ValueError("loader must give at least one image, got none")
        if self._done.keys() != set(range(self._count)):
            other = min(self._done.keys() ^ set(range(self._count)))
            raise ValueError(
                f"{_SAME}, but it gave {self._count} here, and batch {other} was "
                f"{'' if other in self._done else 'not '}measured"
            )


def batch_order(loader: Iterable[Any]) -> list[Any] | None:
    """Return what each batch of a loader is made of, in order, or None where it does not tell.

    A map-style ``DataLoader`` tells it by its samplers.

    Raises:
        ValueError: If the order is another each time, or another on each rank.
    """
    sampler: Any = getattr(loader, "sampler", None)
    alone = collectives.world_size() == 1
    if not alone and isinstance(sampler, DistributedSampler) and sampler.num_replicas > 1:
        raise ValueError(f"{_SAME}, which share them out, so it must have no DistributedSampler")
    # What a subclass makes of its samplers is its own affair.
    if type(loader) is not DataLoader or isinstance(loader.dataset, IterableDataset):
        return None
    batches: Iterable[Any] = sampler if loader.batch_sampler is None else loader.batch_sampler
    own = getattr(sampler, "generator", None)
    state = None if own is None else own.get_state()
    with torch.random.fork_rng(devices=[]):
        order, again = list(batches), list(batches)
    if own is not None:
        own.set_state(state)
    if repr(order) != repr(again):
        raise ValueError(f"{_SAME}; its {type(sampler).__name__} gives another order each time")
    return order


def _only(loader: Any, order: list[Any]) -> Iterable[Sequence[Any]]:
    """Return a ``DataLoader`` like another one, of some of its batches."""
    alike = (
        "num_workers",
        "collate_fn",
        "pin_memory",
        "timeout",
        "worker_init_fn",
        "multiprocessing_context",
        "generator",
        "prefetch_factor",
    )
    options: dict[str, Any] = {name: getattr(loader, name) for name in alike}
    if loader.batch_sampler is None:
        options |= {"batch_size": None, "sampler": order}
    else:
        options["batch_sampler"] = order
    return DataLoader(loader.dataset, **options)


def checked(batch: Sequence[Any], classes: int) -> tuple[Tensor, Tensor]:
    """Return images and labels of a batch.

    Raises:
        TypeError: If it does not begin with images and labels.
        ValueError: If the labels are not one class for each image.
    """
    if not isinstance(batch, Sequence) or len(batch) < 2:
        raise TypeError(f"loader must give (images, labels), got {type(batch).__name__}")
    images, labels = batch[:2]
    for name, value in (("images", images), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not images.is_floating_point():
        raise TypeError(f"images must be floating point, got {images.dtype}")
    if labels.is_floating_point() or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be integers of shape ({len(images)},), "
            f"got {labels.dtype} of shape {tuple(labels.shape)}"
        )
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise ValueError(
            f"labels must be in 0–{classes - 1}, got {int(labels.min())}–{int(labels.max())}"
        )
    return images, labels


def digest(tensors: Iterable[Tensor], *texts: str) -> str:
    """Return a short hash of dtypes, shapes and values of tensors, and of texts."""
    result = hashlib.blake2b(digest_size=8)
    for text in texts:
        result.update(text.encode() + b"\n")
    for tensor in tensors:
        result.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
        result.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return result.hexdigest()
