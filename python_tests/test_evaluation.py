import csv
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from snkernels.evaluation import Evaluation, Score, evaluate
from snkernels.models.stitched import ModelRoute, StitchedViT
from snkernels.models.vit import PlainViT
from snkernels.routing.cost import pareto_front
from snkernels.routing.space import StitchingSpace

Batch = tuple[Tensor, Tensor]


def randomised_model(classes: int = 7) -> StitchedViT:
    """Two tiny anchors whose routes give different answers."""

    def anchor(width: int, depth: int) -> PlainViT:
        return PlainViT(8, 4, 1, classes, embed_dim=width, depth=depth, num_heads=2)

    model = StitchedViT(anchor(8, 2), anchor(12, 4), rank=3)
    with torch.no_grad():
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    return model


@pytest.fixture
def model() -> StitchedViT:
    return randomised_model()


@pytest.fixture
def batches() -> list[Batch]:
    """Three batches of unequal size."""
    return [(torch.randn(n, 1, 8, 8), torch.randint(7, (n,))) for n in (8, 8, 5)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scores_are_those_of_each_route_alone(
    model: StitchedViT, batches: list[Batch], dtype: torch.dtype
) -> None:
    model = model.to(dtype)
    result = evaluate(model, iter(batches))
    model.eval()
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    assert [s.id for s in result.scores] == [0, 1, 2, 4]
    assert result.images == 21
    for s in result.scores:
        with torch.no_grad():
            logits = model(images.to(dtype), stitch=s.id)
        ranking = logits.argsort(descending=True)
        assert s.top1 == pytest.approx(100 * (ranking[:, 0] == labels).double().mean().item())
        in_five = (ranking[:, :5] == labels[:, None]).any(1)
        assert s.top5 == pytest.approx(100 * in_five.double().mean().item())
        assert s.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert len({s.loss for s in result.scores}) == 4
    front = pareto_front([s.flops for s in result.scores], [s.top1 for s in result.scores])
    assert result.front() == [result.scores[i] for i in front]
    assert [s.on_front for s in result.scores] == [i in front for i in range(4)]


def test_a_batch_takes_all_routes_in_one_forward(model: StitchedViT, batches: list[Batch]) -> None:
    events: list[Any] = []
    model.register_forward_pre_hook(lambda *_: events.append("forward"))

    def read() -> Iterator[Batch]:
        for batch in batches:
            events.append("batch")
            yield batch

    evaluate(model, read(), [4, 0])
    assert events == ["batch", "forward"] * 3


def test_modes_come_back(model: StitchedViT, batches: list[Batch]) -> None:
    model.train()
    model.small.blocks[0].eval()
    before = [module.training for module in model.modules()]
    seen = []
    model.small.blocks[1].register_forward_hook(
        lambda block, *_: seen.append((block.training, torch.is_inference_mode_enabled()))
    )
    evaluate(model, batches)
    assert set(seen) == {(False, True)}
    assert [module.training for module in model.modules()] == before
    assert not torch.is_inference_mode_enabled()

    def failing() -> Iterator[Batch]:
        yield batches[0]
        raise RuntimeError("the disk is gone")

    with pytest.raises(RuntimeError, match="the disk is gone"):
        evaluate(model, failing())
    assert [module.training for module in model.modules()] == before
    assert not torch.is_inference_mode_enabled()


def test_training_goes_on_after_an_evaluation(model: StitchedViT, batches: list[Batch]) -> None:
    images, labels = batches[0]
    model.train()
    evaluate(model, batches)
    F.cross_entropy(model(images, stitch=2), labels).backward()
    assert model.stitch_layers[0][0].transform.lora_A.grad.abs().sum() > 0


def test_routes_in_the_order_asked_for(model: StitchedViT, batches: list[Batch]) -> None:
    every = {s.id: s for s in evaluate(model, batches).scores}
    some = evaluate(model, batches, routes=(r for r in (4, 0)))
    assert [(s.id, s.top1, s.loss) for s in some.scores] == [
        (i, every[i].top1, every[i].loss) for i in (4, 0)
    ]
    alone = evaluate(model, batches, [2])
    assert alone.front() == list(alone.scores)


def test_what_is_around_a_model_changes_nothing(
    model: StitchedViT, batches: list[Batch], tmp_path: Path
) -> None:
    expected = evaluate(model, batches)
    model.train()
    torch.distributed.init_process_group(
        "gloo", f"file://{tmp_path / 'meeting'}", rank=0, world_size=1
    )
    try:
        for wrapper in (
            nn.parallel.DistributedDataParallel(model),
            torch.optim.swa_utils.AveragedModel(model),
            torch.compile(nn.DataParallel(model), backend="eager"),
        ):
            assert evaluate(wrapper, batches) == expected
    finally:
        torch.distributed.destroy_process_group()
    assert all(module.training for module in model.modules())
    for wrong in (nn.Linear(2, 2), nn.ModuleDict({"module": model, "other": model}), None):
        with pytest.raises(TypeError, match=r"model must be a StitchedViT, .* got"):
            evaluate(wrong, batches)


@pytest.mark.parametrize(
    ("routes", "message"),
    [
        ([3], "route id must be in 0–2 or 4–4, got 3"),
        ([0, 2, 0], r"routes must name each route only once, got \[0, 2, 0\]"),
        ([], "routes must name at least one route, got none"),
        ("some", "must be \"all\" or route ids, got 'some'"),
    ],
)
def test_unknown_routes_are_refused(
    model: StitchedViT, batches: list[Batch], routes: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(model, batches, routes)


IMAGES, LABELS = torch.zeros(3, 1, 8, 8), torch.zeros(3, dtype=torch.int64)


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "at least one image"),
        ([(IMAGES[:0], LABELS[:0])], ValueError, "at least one image"),
        (None, TypeError, "loader must be an iterable, such as a DataLoader, got NoneType"),
        ([IMAGES], TypeError, r"\(images, labels\), got Tensor"),
        ([(IMAGES, [0, 1, 2])], TypeError, "labels must be a tensor, got list"),
        ([(IMAGES.byte(), LABELS)], TypeError, "images must be floating point, got torch.uint8"),
        ([(IMAGES, LABELS[:2])], ValueError, r"shape \(3,\), got torch.int64 of shape \(2,\)"),
        ([(IMAGES, LABELS.float())], ValueError, "must be integers .* got torch.float32"),
        ([(IMAGES, LABELS + 7)], ValueError, "labels must be in 0–6, got 7–7"),
        ([(IMAGES, LABELS - 1)], ValueError, "labels must be in 0–6, got -1–-1"),
        ([(IMAGES[:, :, :7], LABELS)], ValueError, "images must have shape"),
    ],
)
def test_bad_data_is_named(
    model: StitchedViT, loader: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(model, loader)


def test_a_route_that_fails_is_named(model: StitchedViT, batches: list[Batch]) -> None:
    with torch.no_grad():
        model.stitch_layers[0][0].transform.bias[1] = torch.nan
    with pytest.raises(ValueError, match=r"logits of route 2 \(S0 → L2–3\) must be finite"):
        evaluate(model, batches)
    assert len(evaluate(model, batches, [0, 1, 4]).scores) == 3


def test_csv_holds_every_score(model: StitchedViT, batches: list[Batch], tmp_path: Path) -> None:
    result = evaluate(model, batches)
    result.save_csv(tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [
        (int(r["id"]), r["route"], r["direction"], int(r["flops"]), r["on_front"] == "1")
        for r in rows
    ] == [(s.id, str(s.route), s.direction, s.flops, s.on_front) for s in result.scores]
    for row, s in zip(rows, result.scores, strict=True):
        assert float(row["top1"]) == pytest.approx(s.top1, abs=5e-5)
        assert float(row["top5"]) == pytest.approx(s.top5, abs=5e-5)
        assert float(row["loss"]) == pytest.approx(s.loss, abs=5e-7)


def test_top5_is_left_out_with_five_classes(tmp_path: Path) -> None:
    images, labels = torch.randn(6, 1, 8, 8), torch.arange(6) % 5
    result = evaluate(randomised_model(classes=5), [(images, labels)])
    assert {s.top5 for s in result.scores} == {None}
    assert "top-5" not in result.table()
    result.save_csv(tmp_path / "scores.csv")
    with open(tmp_path / "scores.csv", encoding="utf-8", newline="") as file:
        assert {row["top5"] for row in csv.DictReader(file)} == {""}


# Made up: L→S beats the line between the anchors by 5 points, S→L falls 2.5 below it.
MADE_UP = {0: (1e6, 80.0), 1: (5e6, 90.0), 2: (2e6, 80.0), 4: (3e6, 90.0)}


@pytest.fixture
def made_up() -> Callable[..., Evaluation]:
    def build(*ids: int) -> Evaluation:
        space = StitchingSpace(2, 4)
        costs, top1 = zip(*(MADE_UP[i] for i in ids), strict=True)
        front = pareto_front(costs, top1)
        scores = []
        for n, i in enumerate(ids):
            r = space.route(i)
            route = ModelRoute(i, r.segments, r.stitches, flops=int(costs[n]), parameters=0)
            scores.append(Score(route, top1[n], 99.0, 0.5, n in front))
        return Evaluation(tuple(scores), images=400)

    return build


def test_table_is_sorted_by_cost(made_up: Callable[..., Evaluation]) -> None:
    assert str(made_up(0, 1, 2, 4)).splitlines() == [
        "id  route      MFLOPs  top-1 %  top-5 %   loss  front",
        " 0  S0–1         1.00    80.00    99.00  0.500  yes",
        " 2  S0 → L2–3    2.00    80.00    99.00  0.500  no",
        " 4  L0–1 → S1    3.00    90.00    99.00  0.500  yes",
        " 1  L0–3         5.00    90.00    99.00  0.500  no",
    ]


def test_summary_says_where_stitching_wins_and_where_not(
    made_up: Callable[..., Evaluation],
) -> None:
    assert made_up(4, 2, 1, 0).summary().splitlines() == [
        "Anchors: S 80.00 % at 1.00 MFLOPs, L 90.00 % at 5.00 MFLOPs, on 400 images; one image is "
        "0.25 points, one standard error of L is 1.50.",
        "1 of the 2 routes on the Pareto front are stitched.",
        "1 of 2 stitched routes lie above the straight line between the anchors: "
        "L→S 1 of 1, S→L 0 of 1.",
        "Furthest above: route 4 (L0–1 → S1), 90.00 % at 3.00 MFLOPs, by 5.00 points.",
        "Furthest below: route 2 (S0 → L2–3), 80.00 % at 2.00 MFLOPs, by 2.50 points.",
    ]
    assert "Furthest above" not in made_up(0, 1, 2).summary()
    assert "Furthest below" not in made_up(0, 1, 4).summary()


def test_the_line_needs_both_anchors(made_up: Callable[..., Evaluation]) -> None:
    result = made_up(0, 2, 4)
    assert not result.has_anchors
    with pytest.raises(ValueError, match="both anchors"):
        result.summary()


@pytest.mark.parametrize("ids", [(0, 1, 2, 4), (2, 4), (0,)])
def test_plot_names_what_it_shows(
    made_up: Callable[..., Evaluation], tmp_path: Path, ids: tuple[int, ...]
) -> None:
    result = made_up(*ids)
    result.plot(tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    result.plot(tmp_path / "plot.svg", "A title")
    picture = (tmp_path / "plot.svg").read_text(encoding="utf-8")
    shown = {
        "A title": True,
        "cost per image (million multiply-adds)": True,
        "top-1 accuracy on 400 images (%)": True,
        "Pareto front (filled)": True,
        "line between anchors": {0, 1} <= set(ids),
        "80.0 %": 0 in ids,
        "90.0 %": 1 in ids,
        "S→L (1)": 2 in ids,
        "L→S (1)": 4 in ids,
        "L→S→L": False,
    }
    assert {text: f"<!-- {text}" in picture for text in shown} == shown


def test_plot_says_what_to_install(
    made_up: Callable[..., Evaluation], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"pip install 'snkernels\[demo\]'"):
        made_up(0, 1).plot(tmp_path / "plot.png")
