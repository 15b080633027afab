"""The benchmarks of the model layer on a GPU, for which a CPU stands in; no GPU takes part."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks import machine, model, model_gpu
from benchmarks.model_record import ModelRecord
from benchmarks.timing import host_timer
from snkernels import PlainViT, StitchedViT, use_backend
from snkernels.backends import forced_backend

captured: list[tuple[Any, str | None]] = []


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiny anchors in CPU memory, wall clocks for events, and calls for graphs."""

    def capture(self: StitchedViT, batch_size: int, stitch: Any) -> Callable[[Tensor], Tensor]:
        backend = forced_backend()
        captured.append((stitch, backend))

        def replay(images: Tensor) -> Tensor:
            assert len(images) == batch_size
            with use_backend(backend), torch.inference_mode(), torch.autocast("cpu"):
                return self(images, stitch=stitch)

        return replay

    captured.clear()
    monkeypatch.setattr(model, "SHAPES", {"S": (8, 5, 2), "B": (16, 5, 2), "L": (12, 6, 2)})
    monkeypatch.setattr(model, "PlainViT", partial(PlainViT, patch_size=56))
    monkeypatch.setattr(model_gpu, "DEVICE", "cpu")
    monkeypatch.setattr(model_gpu, "BACKENDS", ("torch", "cpu"))
    monkeypatch.setattr(model_gpu, "timer", host_timer)
    monkeypatch.setattr(model_gpu, "launch_timer", host_timer)
    monkeypatch.setattr(StitchedViT, "capture", capture)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    here = {"cpu": "a CPU", "gpu": {"name": "a stand-in"}, "load_average": 0.1}
    monkeypatch.setattr(machine, "describe", lambda: here)


def test_a_whole_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "model.json"
    model_gpu.main(["--out", str(out), "--pair", "SB", "--struck", "cpu"])
    record = ModelRecord.load(out)
    assert (record.device, record.dtype) == ("cuda", "bfloat16")
    found = [(one.section, one.model, *one.sizes.values()) for one in record.comparisons]
    assert found == [
        *(("mixed_batch", "S-B, torch", 16, graph) for graph in (0, 1)),
        *(
            (section, "S-B, torch", 7, batch)
            for section in ("replay", "launch")
            for batch in (1, 16)
        ),
    ]
    eager, graphs = record.comparisons[:2]
    assert eager.least["our single forwards"] == 4.0
    (alike,) = graphs.least
    assert (
        alike.startswith("homogeneous batch") and graphs.least[alike] == eager.least[alike] == 0.9
    )
    assert eager.speedup.keys() == eager.seconds.keys() - {"ours"} > eager.least.keys()
    (accuracy,) = record.accuracy
    assert accuracy.routes == 22 and 0 <= accuracy.within <= 1
    table = out.with_suffix(".md").read_text()
    assert table.startswith("a stand-in, bfloat16 by autocast; torch")
    assert "| S-B, torch | 1 | 22 | " in table and table in capsys.readouterr().out
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_what_is_struck_or_too_late_is_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "model.json"
    assert model_gpu.main(["--out", str(out), "--limit", "-1", "--struck", "cpu"]) == 1
    assert "no time was left for 7 of 7 measurements" in capsys.readouterr().err
    assert not out.exists()


def test_a_graph_is_captured_on_the_backend_that_its_figure_is_of() -> None:
    jobs = list(model_gpu.jobs("SB", ["torch", "cpu"]))
    (other,) = (job for job in jobs[2:4] if job().model == "S-B, cpu")
    captured.clear()
    other()
    assert len(captured) == 18 and {backend for _, backend in captured} == {"cpu"}


def test_no_speed_of_wrong_logits(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    right = StitchedViT.forward
    wrong = lambda *args, **kwargs: right(*args, **kwargs) * 1.1  # noqa: E731
    monkeypatch.setattr(StitchedViT, "forward", wrong)
    for job in list(model_gpu.jobs("SB", ["torch"]))[:6]:
        with pytest.raises(AssertionError, match="S-B, torch, ours: "):
            job()


def test_without_a_gpu_it_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert model_gpu.main(["--out", str(tmp_path / "model.json")]) == 2
    assert "No GPU" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())
