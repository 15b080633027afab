from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from snkernels.batches import Share, Tally, batch_order, checked, digest

IMAGES, LABELS = torch.randn(10, 1, 4, 4), torch.arange(10) % 5
DATA = TensorDataset(IMAGES, LABELS)


class Counting(TensorDataset):
    """Remembers which images were read."""

    def __init__(self) -> None:
        super().__init__(IMAGES, LABELS)
        self.read: list[int] = []

    def __getitem__(self, index: Any) -> tuple[Tensor, ...]:
        self.read.append(index)
        return super().__getitem__(index)


class Endless(IterableDataset[Any]):
    def __iter__(self) -> Any:
        yield from DATA


def tally(batch: int, labels: Tensor) -> Tally:
    return Tally(batch, len(labels), digest([labels]), [0], [0], [0.0])


def test_order_of_what_tells_it() -> None:
    rows = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert batch_order(DataLoader(DATA, 4)) == rows
    assert batch_order(DataLoader(DATA, 4, drop_last=True)) == rows[:2]
    sampler = BatchSampler(SequentialSampler(DATA), 4, drop_last=False)
    assert batch_order(DataLoader(DATA, batch_sampler=sampler)) == rows
    assert batch_order(DataLoader(DATA, batch_size=None)) == list(range(10))


def test_no_order_of_what_does_not() -> None:
    assert batch_order([(IMAGES, LABELS)]) is None
    assert batch_order(DataLoader(Endless(), 4)) is None
    assert batch_order(type("Own", (DataLoader,), {})(DATA, 4)) is None


def test_an_order_that_changes_is_refused() -> None:
    with pytest.raises(ValueError, match="RandomSampler gives another order each time"):
        batch_order(DataLoader(DATA, 4, shuffle=True))
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(ValueError, match="another order each time"):
        batch_order(DataLoader(DATA, 4, sampler=RandomSampler(DATA, generator=generator)))


@pytest.mark.parametrize("own", [False, True])
def test_asking_for_the_order_draws_no_random_numbers(own: bool) -> None:
    generator = torch.Generator().manual_seed(0) if own else None
    loader = DataLoader(DATA, 4, shuffle=True, generator=generator)
    generators = [torch.default_generator, *([generator] if generator else [])]
    before = [each.get_state() for each in generators]
    with pytest.raises(ValueError, match="another order each time"):
        batch_order(loader)
    for each, state in zip(generators, before, strict=True):
        assert torch.equal(each.get_state(), state)


def test_only_what_is_left_is_loaded_and_one_to_compare() -> None:
    data = Counting()
    loader = DataLoader(data, 4)
    order = batch_order(loader)
    share = Share(loader, order, 5, {1: tally(1, LABELS[4:8])}, whole=False)
    assert len(share) == 2
    assert [index for index, _, _ in share] == [0, 2]
    assert sorted(data.read) == list(range(10))
    data.read.clear()
    done = {0: tally(0, LABELS[:4]), 1: tally(1, LABELS[4:8])}
    assert [index for index, _, _ in Share(loader, order, 5, done, whole=False)] == [2]
    assert data.read == [0, 1, 2, 3, 8, 9], "the first that was measured, and what was not"


def test_other_labels_than_were_measured_are_noticed() -> None:
    share = Share(DataLoader(DATA, 4), [[0, 1, 2, 3]], 5, {0: tally(0, LABELS[1:5])}, whole=False)
    assert not list(share)
    with pytest.raises(ValueError, match="other labels in batch 0 were measured"):
        share.compare()


def test_close_counts_the_batches() -> None:
    batches = [(IMAGES[:4], LABELS[:4]), (IMAGES[4:], LABELS[4:])]
    done: dict[int, Tally] = {}
    share = Share(batches, None, 5, done, whole=False)
    for index, _, labels in share:
        done[index] = tally(index, labels)
    share.close()
    done[2] = tally(2, LABELS[:1])
    with pytest.raises(ValueError, match="it gave 2 here, and batch 2 was measured"):
        share.close()
    del done[2], done[1]
    with pytest.raises(ValueError, match="it gave 2 here, and batch 1 was not measured"):
        share.close()
    with pytest.raises(ValueError, match="loader must give at least one image, got none"):
        Share([], None, 5, {}, whole=False).close()


@pytest.mark.parametrize(
    ("batch", "error", "message"),
    [
        (IMAGES, TypeError, r"loader must give \(images, labels\), got Tensor"),
        ([IMAGES], TypeError, r"loader must give \(images, labels\), got list"),
        ([IMAGES.numpy(), LABELS], TypeError, "images must be a tensor, got ndarray"),
        ([IMAGES, LABELS.tolist()], TypeError, "labels must be a tensor, got list"),
        ([IMAGES.int(), LABELS], TypeError, r"images must be floating point, got torch\.int32"),
        ([IMAGES, LABELS.float()], ValueError, r"integers of shape \(10,\), got torch\.float32"),
        ([IMAGES, LABELS[:9]], ValueError, r"integers of shape \(10,\), got .* \(9,\)"),
        ([IMAGES, LABELS + 1], ValueError, "labels must be in 0–4, got 1–5"),
        ([IMAGES, LABELS - 1], ValueError, "labels must be in 0–4, got -1–3"),
    ],
)
def test_bad_batches(batch: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        checked(batch, 5)


def test_digest_tells_values_shapes_dtypes_and_texts_apart() -> None:
    values = torch.arange(6.0)
    others = [
        digest([values]),
        digest([values.view(2, 3)]),
        digest([values.view(2, 3).T]),
        digest([values.to(torch.int32).view(torch.float32)]),
        digest([values.view(torch.int32)]),
        digest([values[:3], values[3:]]),
        digest([values], "text"),
        digest([values], "te", "xt"),
    ]
    assert len(set(others)) == len(others)
    assert digest([values.view(2, 3).T.contiguous()]) == others[2]
