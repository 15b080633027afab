import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from snkernels import demo
from snkernels.demo import AnchorRecipe, HeldOut, Recipe
from snkernels.evaluation import Evaluation, evaluate
from snkernels.models import checkpoint
from snkernels.models.stitched import StitchedViT

MINI = Recipe(
    small=AnchorRecipe(8, 2, 2, steps=20),
    large=AnchorRecipe(16, 4, 2, steps=20, drop_path_rate=0.1),
    rank=2,
    finetune_steps=30,
)


def run(out: Path, seed: int = 0) -> tuple[Evaluation, str]:
    lines: list[str] = []
    result = demo.run(out, seed, MINI, say=lines.append, progress=False)
    return result, "\n".join(lines)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evaluation, str]:
    """A folder that the miniature demo filled, its result, and what it said."""
    out = tmp_path_factory.mktemp("demo") / "new" / "folder"
    return out, *run(out)


def test_the_same_seed_gives_the_same_files(
    finished: tuple[Path, Evaluation, str], tmp_path: Path
) -> None:
    out, result, _ = finished
    torch.manual_seed(5)
    expected = torch.randn(1)
    torch.manual_seed(5)
    torch.set_num_threads(2)
    try:
        again, _ = run(tmp_path / "again")
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(1)
    assert torch.equal(torch.randn(1), expected)
    assert again.scores == result.scores
    for name in (demo.TABLE, demo.CSV):
        assert (tmp_path / "again" / name).read_bytes() == (out / name).read_bytes(), name
    tensors, config = checkpoint.read(out / demo.CHECKPOINT)
    tensors_again, config_again = checkpoint.read(tmp_path / "again" / demo.CHECKPOINT)
    assert config_again == config
    assert tensors_again.keys() == tensors.keys()
    assert all(torch.equal(tensors_again[key], tensors[key]) for key in tensors)
    other, _ = run(tmp_path / "again", seed=1)
    assert [s.loss for s in other.scores] != [s.loss for s in result.scores]


def test_every_file_is_written_and_named(finished: tuple[Path, Evaluation, str]) -> None:
    out, result, said = finished
    assert {path.name for path in out.iterdir()} == set(demo.FILES)
    table = (out / demo.TABLE).read_text(encoding="utf-8")
    assert table == f"{result.table()}\n\n{result.summary()}\n"
    assert table in said
    assert all(name in said for name in demo.FILES)
    record = json.loads((out / demo.RECORD).read_text(encoding="utf-8"))
    assert record["recipe"]["finetune_steps"] == 30
    assert set(record["seconds"]) == {
        "anchor S",
        "anchor L",
        "stitches",
        "fine-tuning",
        "evaluation",
    }


def test_every_route_is_measured_on_what_was_held_out(
    finished: tuple[Path, Evaluation, str],
) -> None:
    _, result, _ = finished
    assert [s.id for s in result.scores] == [0, 1, 2, 4]
    assert result.images == 600


def test_the_checkpoint_gives_the_same_scores(finished: tuple[Path, Evaluation, str]) -> None:
    out, result, _ = finished
    model, batches = demo.load(out / demo.CHECKPOINT)
    assert evaluate(model, batches).scores == result.scores


def test_a_checkpoint_without_settings_is_refused(tmp_path: Path) -> None:
    model = StitchedViT(demo.new_anchor(MINI.small), demo.new_anchor(MINI.large), rank=0)
    model.save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="does not say what to evaluate it on"):
        demo.load(tmp_path / "model.safetensors")


def test_the_split_is_fixed_and_disjoint() -> None:
    (train, train_labels), (held_out, labels) = demo.digits(HeldOut())
    assert train.shape == (1197, 1, 8, 8) and held_out.shape == (600, 1, 8, 8)
    assert train.dtype == torch.float32
    assert (held_out.min(), held_out.max()) == (-1, 1)
    assert labels[:10].tolist() == [3, 3, 0, 8, 2, 4, 5, 9, 0, 5]
    every = torch.cat((train, held_out)).flatten(1)
    (a, a_labels), (b, b_labels) = demo.digits(HeldOut(images=10, split_seed=1))
    assert len(b) == 10
    other = torch.cat((a, b)).flatten(1)
    assert torch.equal(every.unique(dim=0), other.unique(dim=0))
    counts = torch.cat((train_labels, labels)).bincount()
    assert torch.equal(counts, torch.cat((a_labels, b_labels)).bincount())


def test_moved_digits_stay_about_where_they_were() -> None:
    (images, _), _ = demo.digits(HeldOut())
    images = images[:200]
    moved = demo.moved(images)
    assert moved.shape == images.shape
    assert moved.min() >= -1 - 1e-6 and moved.max() <= 1 + 1e-6
    assert torch.equal(demo.moved(torch.full_like(images, -1)), torch.full_like(images, -1))
    steps = (centre(moved) - centre(images)).abs()
    assert 0.1 < steps.mean() < 0.75 and steps.max() < 1.5


def centre(images: Tensor) -> Tensor:
    """Row and column of the centre of ink of each image, in pixels."""
    ink = (images[:, 0] + 1) / (images[:, 0] + 1).sum((1, 2), keepdim=True)
    pixels = torch.arange(8.0)
    return torch.stack(((ink.sum(2) * pixels).sum(1), (ink.sum(1) * pixels).sum(1)), dim=1)


def test_training_learns_and_leaves_the_frozen_weights() -> None:
    data, _ = demo.digits(HeldOut())
    small, large = demo.new_anchor(MINI.small), demo.new_anchor(MINI.large)
    demo.train(large, data, 100, MINI, "large", False)
    assert not large.training
    with torch.no_grad():
        accuracy = (large(data[0]).argmax(1) == data[1]).double().mean()
    assert accuracy > 0.6
    model = StitchedViT(small, large, rank=2)
    frozen = [layer.transform.weight for layers in model.stitch_layers for layer in layers]
    before = [weight.clone() for weight in frozen]
    demo.train(model, data, 3, MINI, "stitched", False)
    assert all(map(torch.equal, before, frozen))
    assert model.sampler.state_dict()["draws"] == 3


def test_files_of_others_are_left_alone(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("mine")
    assert demo.claim(tmp_path) == tmp_path
    (tmp_path / demo.CSV).write_text("mine too")
    for record in (None, "no JSON", "[]", '{"written_by": "someone"}'):
        if record is not None:
            (tmp_path / demo.RECORD).write_text(record)
        with pytest.raises(FileExistsError, match=r"holds pareto\.csv.* did not write.*--out"):
            demo.run(tmp_path, recipe=MINI)
    assert (tmp_path / demo.CSV).read_text() == "mine too"
    (tmp_path / demo.RECORD).write_text('{"written_by": "snkernels demo"}')
    assert demo.claim(tmp_path) == tmp_path


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(FileExistsError, match="file is a file; --out must name a folder"):
        demo.run(tmp_path / "file", recipe=MINI)


@pytest.mark.parametrize(
    ("module", "package"), [("sklearn", "scikit-learn"), ("matplotlib", "matplotlib")]
)
def test_a_missing_extra_is_named_before_any_work(
    module: str, package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda name: None if name == module else object()
    )
    with pytest.raises(ImportError, match=rf"needs {package}: pip install 'snkernels\[demo\]'"):
        demo.run(tmp_path / "out", recipe=MINI)
    assert not (tmp_path / "out").exists()
