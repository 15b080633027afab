"""Evaluation that is interrupted and goes on, in one process and in several."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, TensorDataset

from snkernels.evaluation import Evaluation, evaluate
from snkernels.journal import Journal
from snkernels.models.stitched import StitchedViT
from snkernels.models.vit import PlainViT

IMAGES = 22
BATCH = 4


class Digits(Dataset[tuple[Tensor, Tensor]]):
    """Random images and labels; remembers what was read, and fails where it is told to."""

    def __init__(self, broken: int | None = None, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.images = torch.randn(IMAGES, 1, 8, 8, generator=generator)
        self.labels = torch.randint(7, (IMAGES,), generator=generator)
        self.broken = broken
        self.read: list[int] = []

    def __len__(self) -> int:
        return IMAGES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.broken:
            raise OSError("the disk is gone")
        self.read.append(index)
        return self.images[index], self.labels[index]


class Stream(IterableDataset[tuple[Tensor, Tensor]]):
    def __init__(self, data: Digits) -> None:
        self.data = data

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        yield from (self.data[i] for i in range(IMAGES))


def ordered(data: Digits) -> DataLoader[Any]:
    return DataLoader(data, BATCH)


def streamed(data: Digits) -> DataLoader[Any]:
    return DataLoader(Stream(data), BATCH)


def listed(data: Digits) -> Any:
    return [
        (data.images[i : i + BATCH], data.labels[i : i + BATCH]) for i in range(0, IMAGES, BATCH)
    ]


def randomised_model() -> StitchedViT:
    """Two tiny anchors whose routes give different answers, the same ones in every process."""

    def anchor(width: int, depth: int) -> PlainViT:
        return PlainViT(8, 4, 1, 7, embed_dim=width, depth=depth, num_heads=2)

    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = StitchedViT(anchor(8, 2), anchor(12, 4), rank=3)
        with torch.no_grad():
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def model() -> StitchedViT:
    return randomised_model()


@pytest.fixture
def whole(model: StitchedViT) -> Evaluation:
    """What an evaluation without interruption gives."""
    return evaluate(model, ordered(Digits()))


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "eval.jsonl"


def interrupt(model: StitchedViT, file: Path, broken: int = 13) -> None:
    """Evaluate until batch 3 of 6, which holds images 12 to 15, cannot be read."""
    with pytest.raises(OSError, match="the disk is gone"):
        evaluate(model, ordered(Digits(broken)), resume=file)


@pytest.mark.parametrize("loader", [ordered, streamed])
def test_an_interrupted_run_goes_on(
    model: StitchedViT, whole: Evaluation, file: Path, loader: Callable[[Digits], Any]
) -> None:
    with pytest.raises(OSError, match="the disk is gone"):
        evaluate(model, loader(Digits(broken=13)), resume=file)
    assert [json.loads(line).get("batch") for line in file.read_text().splitlines()] == [
        None, 0, 1, 2,
    ]  # fmt: skip
    forwards = []
    model.register_forward_pre_hook(lambda _, images: forwards.append(len(images[0])))
    data = Digits()
    assert evaluate(model, loader(data), resume=file) == whole
    assert forwards == [4, 4, 2]
    # An ordered loader loads, beside what is missing, the first batch, to compare its labels.
    missing = [*range(BATCH), *range(3 * BATCH, IMAGES)]
    assert data.read == (missing if loader is ordered else list(range(IMAGES)))
    # Finished, it has the result without another forward.
    data.read.clear()
    before = file.read_bytes()
    assert evaluate(model, loader(data), resume=file) == whole
    assert len(forwards) == 3
    assert data.read == list(range(BATCH))
    assert file.read_bytes() == before


def test_a_torn_line_is_measured_again(model: StitchedViT, whole: Evaluation, file: Path) -> None:
    evaluate(model, ordered(Digits()), resume=file)
    content = file.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    for size in (0, 1, ends[0] - 1, ends[0], ends[0] + 1, ends[3] - 1, ends[3] + 9, ends[-1] - 1):
        file.write_bytes(content[:size])
        assert evaluate(model, ordered(Digits()), resume=file) == whole
        assert file.read_bytes() == content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: {"model": perturbed(m)}, "does not fit: weights was"),
        (lambda m: {"model": m.double()}, "does not fit: weights was"),
        (lambda m: {"routes": [0, 4]}, r"routes was \[0, 1, 2, 4\] there, here it is \[0, 4\]"),
        (lambda m: {"loader": listed(Digits())}, "order was '.*' there, here it is None"),
        (lambda m: {"loader": DataLoader(Digits(), 5)}, "batches was 6 there, here it is 5"),
        (
            lambda m: {"loader": DataLoader(Digits(), BATCH, sampler=range(IMAGES - 1, -1, -1))},
            "does not fit: order was",
        ),
        (lambda m: {"loader": ordered(Digits(seed=1))}, "other labels in batch 0 were measured"),
        (
            lambda m: {"loader": DataLoader(Digits(), BATCH, shuffle=True)},
            "its RandomSampler gives another order each time",
        ),
    ],
)  # fmt: skip
def test_a_file_of_something_else_is_refused(
    model: StitchedViT, file: Path, change: Callable[[StitchedViT], dict[str, Any]], message: str
) -> None:
    interrupt(model, file)
    before = file.read_bytes()
    arguments = {"model": model, "loader": ordered(Digits()), **change(model)}
    with pytest.raises(ValueError, match=message):
        evaluate(**arguments, resume=file)
    assert file.read_bytes() == before


def perturbed(model: StitchedViT) -> StitchedViT:
    with torch.no_grad():
        model.stitch_layers[0][0].transform.bias[0] += 1e-6
    return model


def test_a_list_of_other_batches_is_noticed(model: StitchedViT, file: Path) -> None:
    batches = listed(Digits())
    broken = [*batches[:3], ("no images", "no labels"), *batches[4:]]
    with pytest.raises(TypeError, match="images must be a tensor"):
        evaluate(model, broken, resume=file)
    images, labels = batches[2]
    swapped = [*batches[:2], (images, (labels + 1) % 7), *batches[3:]]
    with pytest.raises(ValueError, match="other labels in batch 2 were measured"):
        evaluate(model, swapped, resume=file)
    evaluate(model, batches, resume=file)


def test_a_shorter_stream_is_noticed(model: StitchedViT, file: Path) -> None:
    def give(count: int) -> Iterator[Any]:
        yield from listed(Digits())[:count]
        if count == 4:
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        evaluate(model, give(4), resume=file)
    with pytest.raises(ValueError, match="it gave 3 here, and batch 3 was measured"):
        evaluate(model, give(3), resume=file)


def test_no_data_is_not_the_end(model: StitchedViT, whole: Evaluation, file: Path) -> None:
    for _ in range(2):
        with pytest.raises(ValueError, match="at least one image, got none"):
            evaluate(model, iter([]), resume=file)
    assert evaluate(model, iter(listed(Digits())), resume=file) == whole


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"id,top1\n0,80\n", "is not a file to resume from"),
        (b'{"a": 1}\n', "is not a file to resume from"),
        (b"someone's notes", "is not a file to resume from"),
        (None, "is damaged: line 2 is no JSON object"),
        (b'{"batch": 9}\n', "is damaged: {'batch': 9} is no finished batch"),
    ],
)
def test_foreign_and_damaged_files_are_left_alone(
    model: StitchedViT, file: Path, content: bytes | None, message: str
) -> None:
    interrupt(model, file)
    lines = file.read_bytes().splitlines(keepends=True)
    if content is None:
        content = lines[0] + lines[1][:-9] + b"\n" + lines[2]
    elif b"batch" in content:
        content = lines[0] + content
    file.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        evaluate(model, ordered(Digits()), resume=file)
    assert file.read_bytes() == content


def test_a_loader_is_sliced_whatever_its_settings(
    model: StitchedViT, whole: Evaluation, file: Path
) -> None:
    interrupt(model, file)
    data = Digits()
    batches = [data.images[i : i + BATCH] for i in range(0, IMAGES, BATCH)]
    labels = [data.labels[i : i + BATCH] for i in range(0, IMAGES, BATCH)]
    premade = DataLoader(list(zip(batches, labels, strict=True)), batch_size=None)
    with pytest.raises(ValueError, match="does not fit: order was"):
        evaluate(model, premade, resume=file)
    assert evaluate(model, premade, resume=file.with_suffix(".premade")) == whole
    halves = DataLoader(
        TensorDataset(data.images, data.labels),
        BATCH,
        drop_last=True,
        collate_fn=lambda items: tuple(
            torch.stack(parts)[:2] for parts in zip(*items, strict=True)
        ),
    )
    half = file.with_suffix(".halves")
    assert evaluate(model, halves, resume=half) == evaluate(model, list(halves))


def test_without_a_file_a_loader_may_shuffle(model: StitchedViT, whole: Evaluation) -> None:
    result = evaluate(model, DataLoader(Digits(), BATCH, shuffle=True))
    assert [s.top1 for s in result.scores] == [s.top1 for s in whole.scores]


def test_a_full_disk_loses_nothing(
    model: StitchedViT, whole: Evaluation, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, calls = Journal.append, []

    def full(journal: Journal, entries: Any) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        append(journal, entries)

    monkeypatch.setattr(Journal, "append", full)
    with pytest.raises(OSError, match="No space left"):
        evaluate(model, ordered(Digits()), resume=file)
    assert evaluate(model, ordered(Digits()), resume=file) == whole


def evaluate_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    model, file, results = randomised_model(), Path(folder) / "eval.jsonl", {}
    data = Digits()
    results["ordered"] = evaluate(model, ordered(data))
    results["read"] = data.read
    results["streamed"] = evaluate(model, streamed(Digits()))
    results["listed"] = evaluate(model, listed(Digits()))

    def error(name: str, *arguments: Any, **options: Any) -> None:
        try:
            evaluate(*arguments, **options)
        except Exception as caught:
            results[name] = f"{type(caught).__name__}: {caught}"

    results["taken over"] = evaluate(model, ordered(Digits()), resume=file.with_name("one.jsonl"))
    # One rank's faults are all ranks' errors, and what the other has finished stays.
    error("broken", model, ordered(Digits(broken=13 if rank else None)), resume=file)
    results["finished"] = sorted(
        json.loads(line).get("batch", -1) for line in file.read_text().splitlines()
    )
    results["goes on"] = evaluate(model, ordered(Digits()), resume=file)
    Path(folder, f"finished.{rank}").write_bytes(file.read_bytes())
    error("weights", perturbed(randomised_model()) if rank else model, ordered(Digits()))
    error("short", model, iter(listed(Digits())[: 4 if rank else None]))
    error("other data", model, iter(listed(Digits(seed=rank))))
    error("no route", model, ordered(Digits()), [0, 3] if rank else [0, 1])
    error("foreign", model, ordered(Digits()), resume=Path(folder) / "meet")
    data = Digits()
    error("padding", model, DataLoader(data, BATCH, sampler=DistributedSampler(data)))
    error("empty", model, [])
    torch.save(results, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_give_the_result_of_one(
    model: StitchedViT, whole: Evaluation, tmp_path: Path, file: Path
) -> None:
    interrupt(model, tmp_path / "one.jsonl")
    mp.spawn(evaluate_on_rank, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{i}.pt", weights_only=False) for i in range(2))
    for results in (first, second):
        for name in ("ordered", "streamed", "listed", "taken over", "goes on"):
            assert results[name] == whole
        assert results["finished"] == [-1, 0, 1, 2]
    # Batches 0, 2, 4 and 1, 3, 5.
    assert first["read"] == [i for i in range(IMAGES) if i // BATCH % 2 == 0]
    assert second["read"] == [i for i in range(IMAGES) if i // BATCH % 2 == 1]
    expected = {
        "broken": ("RuntimeError: rank 1 failed: OSError: the disk is gone", "OSError: the disk"),
        "weights": ("ValueError: all ranks must measure the same, but weights is",) * 2,
        "short": (
            "ValueError: loader must give the same batches each time and on all ranks, but it gave "
            "6 here, and batch 5 was not measured",
            "ValueError: loader must give the same batches each time and on all ranks, but it gave "
            "4 here, and batch 4 was measured",
        ),
        "other data": ("ValueError: loader must give the same batches",) * 2,
        "no route": ("RuntimeError: rank 1 failed: ValueError: route id", "ValueError: route id"),
        "padding": (
            "ValueError: loader must give the same batches each time and on all ranks, "
            "which share them out, so it must have no DistributedSampler",
        )
        * 2,
        "empty": ("ValueError: loader must give at least one image",) * 2,
        "foreign": ("ValueError: ", "RuntimeError: rank 0 failed: ValueError: "),
    }
    for name, texts in expected.items():
        for results, text in zip((first, second), texts, strict=True):
            assert results[name].startswith(text), (name, results[name])
    # One process takes what two have finished.
    assert evaluate(model, ordered(Digits()), resume=file) == whole
    assert (tmp_path / "finished.0").read_bytes() == file.read_bytes()
