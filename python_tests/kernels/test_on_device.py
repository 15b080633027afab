"""The cache of integers in GPU memory, by its rules: streams and copies are stand-ins here."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from snkernels.kernels import on_device as module
from snkernels.kernels.on_device import MOST_KEPT, on_device

GPU = torch.device("cuda", 0)


class Stream:
    def __init__(self) -> None:
        self.waited: list[Any] = []

    def record_event(self) -> tuple[str, "Stream"]:
        return "copied on", self

    def wait_event(self, event: Any) -> None:
        self.waited.append(event)


class Host:
    """Pinned memory, and what is copied from it."""

    def __init__(self, values: tuple[int, ...], **options: Any) -> None:
        assert options == {"dtype": torch.int64, "pin_memory": True}
        self.values, self.used_on = values, []

    def to(self, device: torch.device, non_blocking: bool) -> "Host":
        assert device == GPU
        assert non_blocking
        return self

    def record_stream(self, stream: Stream) -> None:
        self.used_on.append(stream)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    state = SimpleNamespace(stream=Stream(), capturing=False)
    monkeypatch.setattr(module, "_kept", type(module._kept)())
    monkeypatch.setattr(torch, "tensor", Host)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: state.capturing)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: state.stream)
    yield state


def test_off_a_gpu_it_is_a_tensor() -> None:
    assert on_device((3, -1, 2**62), torch.device("cpu")).tolist() == [3, -1, 2**62]


def test_the_same_values_are_copied_once_and_never_waited_for(gpu: SimpleNamespace) -> None:
    first = on_device((1, 2), GPU)
    assert on_device((1, 2), GPU) is first
    assert on_device((1, 3), GPU) is not first
    assert not gpu.stream.waited


def test_another_stream_waits_for_the_copy_and_keeps_the_memory(gpu: SimpleNamespace) -> None:
    first, copied_on = on_device((1, 2), GPU), gpu.stream
    gpu.stream = Stream()
    assert on_device((1, 2), GPU) is first
    assert gpu.stream.waited == [("copied on", copied_on)]
    assert first.used_on == [gpu.stream]


def test_a_graph_finds_what_was_there_and_keeps_it(gpu: SimpleNamespace) -> None:
    first = on_device((0,), GPU)
    gpu.stream, gpu.capturing = Stream(), True
    assert on_device((0,), GPU) is first
    assert not gpu.stream.waited
    with pytest.raises(RuntimeError, match="must have run once before"):
        on_device((1,), GPU)
    gpu.capturing = False
    second = on_device((1,), GPU)
    for i in range(2, MOST_KEPT + 1):
        on_device((i,), GPU)
    assert on_device((0,), GPU) is first
    assert on_device((1,), GPU) is not second
    assert len(module._kept) == MOST_KEPT
