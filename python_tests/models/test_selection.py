"""Scores, profiles and budgets: how a model picks a route by what it may cost."""

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from snkernels.models import checkpoint
from snkernels.models.setting import setting_of, shapes_of
from snkernels.models.stitched import StitchedViT
from snkernels.routing.budget import Budget
from snkernels.routing.latency import Parts, Profile

Make = Callable[..., StitchedViT]

# Of the tiny pair: S0–1, L0–3, S0 → L2–3, L0–1 → S1.
SCORES = {0: 60.0, 1: 80.0, 2: 85.0, 4: 60.0}


def profile_of(model: StitchedViT) -> Profile:
    """One in which block after block takes 1 ms in S and 10 in L, and twice that at batch 4."""
    one = Parts((0.0, 0.0), (0.001, 0.01), (0.001, 0.01), (0.0, 0.0), (0.001, 0.01))
    twice = Parts((0.0, 0.0), (0.002, 0.02), (0.002, 0.02), (0.0, 0.0), (0.002, 0.02))
    return Profile(setting_of(model), shapes_of(model), {1: one, 4: twice}, ())


@pytest.fixture
def model(make: Make) -> StitchedViT:
    model = make()
    model.scores = SCORES
    model.profile = profile_of(model)
    return model


def share(model: StitchedViT, route_id: int) -> float:
    flops = {route.id: route.flops for route in model.routes}
    return flops[route_id] / flops[1]


def test_the_best_that_fits(model: StitchedViT) -> None:
    selection = model.select(1.0)
    assert selection.route is model.routes[2]
    assert (selection.score, selection.cost) == (85.0, share(model, 2))
    assert selection.better is None
    # Exactly what the route costs is enough, and a little less is not.
    assert model.select(share(model, 2)).route.id == 2
    least = model.select(share(model, 2) * (1 - 1e-9))
    assert least.route.id == 0
    assert least.better is not None and least.better.route.id == 2
    assert (least.fitting, least.scored) == (1, 4)
    flops = model.routes[2].flops
    assert model.select(f"{flops} FLOPs").route.id == 2
    assert model.select(f"{flops - 1} FLOPs").route.id == 0
    model.scores = {4: 60.0, 0: 60.0}
    assert model.select(1.0).route.id == 0  # as good as 4, and cheaper


def test_time_is_that_of_the_batch_size(model: StitchedViT) -> None:
    # Routes 0, 4, 2, 1 take 2, 21, 21, 40 ms at batch 1 and twice that at batch 4.
    assert [model.select("22 ms", batch_size=n).route.id for n in (1, 2, 4)] == [2, 0, 0]
    assert [model.select("28.1 ms", batch_size=n).route.id for n in (1, 2, 4)] == [2, 2, 0]
    assert model.select("0.0421 s", batch_size=4).cost == pytest.approx(0.042)


def test_only_routes_with_a_score_are_offered(model: StitchedViT) -> None:
    model.scores = {4: 1.0, 1: 2}
    assert model.scores == {4: 1.0, 1: 2.0}
    assert model.select(0.9).route.id == 4
    model.scores[0] = 99.0  # a copy
    assert model.select(0.9).route.id == 4


def test_it_says_which_and_why(model: StitchedViT) -> None:
    assert str(model.select("20 ms")) == (
        "route 0 (S0–1), score 60, for 2 ms at batch 1: the best of 1 routes within 20 ms, of 4 "
        "with a score; the next better one is route 2 (S0 → L2–3), score 85, for 21 ms."
    )
    assert str(model.select("100 %")) == (
        f"route 2 (S0 → L2–3), score 85, for {100 * share(model, 2):.4g} %: the best of 4 routes "
        "within 100 %, of 4 with a score; no scored route is better."
    )


def test_an_impossible_budget_names_the_cheapest(model: StitchedViT) -> None:
    for budget, batch_size, cost in (
        ("1.9 ms", 1, r"2 ms"),
        ("3 ms", 4, r"4 ms"),
        (1e-3, 1, rf"{100 * share(model, 0):.4g} %"),
        ("100 FLOPs", 1, rf"{model.routes[0].flops} FLOPs"),
    ):
        with pytest.raises(
            ValueError, match=rf"cheapest with a score, route 0 \(S0–1\), costs {cost}$"
        ):
            model.select(budget, batch_size)


def test_budgets_run_the_routes_they_buy(model: StitchedViT) -> None:
    images = torch.randn(4, 3, 8, 8)
    for training in (False, True):
        model.train(training)
        torch.testing.assert_close(model(images, budget=1.0), model(images, stitch=2))
        assert model.last_route == 2
        # The batch size is that of the call: 42 ms for route 2 at batch 4.
        torch.testing.assert_close(model(images, budget="41 ms"), model(images, stitch=0))
        mixed = [0.9, "43 ms", Budget("seconds", 0.005), np.float64(0.3)]
        ids = [model.select(budget, 4).route.id for budget in mixed]
        assert len(set(ids)) == 2
        torch.testing.assert_close(model(images, budget=mixed), model(images, stitch=ids))
        assert model.last_route is None
    assert model.sampler.state_dict()["draws"] == 0


def wrong_calls() -> list[tuple[dict[str, Any], type[Exception], str]]:
    return [
        ({"stitch": 99}, ValueError, "route id must be in 0–2 or 4–4, got 99"),
        ({"stitch": [0, 3]}, ValueError, "route id must be in 0–2 or 4–4, got 3"),
        ({"stitch": [0, -1]}, ValueError, "route id must be in 0–2 or 4–4, got -1"),
        ({"stitch": [0]}, ValueError, "one route id for each of the 2 images, got 1"),
        ({"stitch": [0, 1, 2]}, ValueError, "one route id for each of the 2 images, got 3"),
        ({"stitch": []}, ValueError, "one route id for each of the 2 images, got 0"),
        ({"stitch": ["0", "1"]}, TypeError, "route id must be an integer, got '0', a str"),
        ({"stitch": [0, 1.5]}, TypeError, "route id must be an integer, got 1.5, a float"),
        ({"routes": []}, ValueError, "routes must name at least one route, got none"),
        ({"routes": [0, 99]}, ValueError, "route id must be in 0–2 or 4–4, got 99"),
        ({"routes": "some"}, ValueError, "routes must be \"all\" or route ids, got 'some'"),
        ({"budget": "8 parsecs"}, ValueError, "budget must be .*'8 ms'.* got '8 parsecs'"),
        ({"budget": float("nan")}, ValueError, "budget must be positive .* got nan"),
        ({"budget": [0.5]}, ValueError, "budget must be one, or one for each of the 2 .* got 1"),
        ({"budget": []}, ValueError, "budget must be one, or one for each of the 2 .* got 0"),
        ({"budget": [1.0, "8 parsecs"]}, ValueError, "budget must be .* got '8 parsecs'"),
        ({"budget": [1.0, "1 us"]}, ValueError, "1 us reaches for none"),
        ({"budget": 1j}, TypeError, "budget must be .* got complex"),
        ({"budget": 0.5, "stitch": 0}, ValueError, "only one of stitch, routes and budget"),
        ({"budget": 0.5, "routes": "all"}, ValueError, "only one of stitch, routes and budget"),
        ({"stitch": 0, "routes": "all"}, ValueError, "only one of stitch, routes and budget"),
        ({"images": torch.empty(0, 3, 8, 8)}, ValueError, "images must hold at least one image"),
        ({"images": torch.full((2, 3, 8, 8), torch.nan)}, ValueError, "images must be finite"),
        ({"images": torch.full((2, 3, 8, 8), torch.inf)}, ValueError, "images must be finite"),
        ({"images": torch.zeros(2, 3, 8, 4)}, ValueError, "images must have shape"),
        ({"images": torch.zeros(2, 3, 8, 8, dtype=torch.int64)}, TypeError, "floating point"),
        ({"images": [[0.0]]}, TypeError, "images must be a tensor, got list"),
        ({"max_rows": 2}, ValueError, "max_rows must be at least 3, got 2"),
        ({"images": torch.zeros(2, 3, 8, 8).double()}, TypeError, r"images must be torch\.float32"),
        ({"images": torch.empty(2, 3, 8, 8, device="meta")}, ValueError, "images must be on cpu"),
        ({"without_grad": ["x"]}, TypeError, "route id must be an integer, got 'x'"),
        ({"without_grad": [99]}, ValueError, "route id must be in 0–2 or 4–4, got 99"),
        ({"without_grad": "all"}, TypeError, "without_grad must hold route ids, got 'all'"),
        ({"without_grad": 1}, TypeError, "without_grad must hold route ids, got 1"),
    ]


@pytest.mark.parametrize(("arguments", "error", "message"), wrong_calls())
def test_a_wrong_call_changes_nothing(
    model: StitchedViT, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    model.train()
    model(torch.randn(2, 3, 8, 8), stitch=4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    rng = torch.get_rng_state()
    with pytest.raises(error, match=message):
        model(**{"images": torch.zeros(2, 3, 8, 8), **arguments})
    assert model.last_route == 4
    assert model.sampler.state_dict()["draws"] == 0
    assert torch.equal(torch.get_rng_state(), rng)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])


def test_what_is_missing_is_said_with_the_way_to_it(make: Make) -> None:
    model = make()
    assert model.scores is None and model.profile is None
    with pytest.raises(RuntimeError, match=r"model\.scores = snkernels\.evaluate\(model, loader\)"):
        model.select(0.5)
    model.scores = SCORES
    assert model.select(1.0).route.id == 2
    with pytest.raises(RuntimeError, match=r"model\.profile = snkernels\.profile\(model, batch"):
        model.select("8 ms")
    with pytest.raises(RuntimeError, match=r"profile must be set"):
        model(torch.zeros(1, 3, 8, 8), budget="8 ms")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"device": "another"}, "device is .* here and was 'another' when it was measured"),
        ({"threads": 99}, "threads is [0-9]+ here and was 99"),
        ({"dtype": "bfloat16"}, "dtype is 'float32' here and was 'bfloat16'"),
        ({"torch": "1.0"}, r"torch is '.*' here and was '1\.0'"),
    ],
)
def test_time_elsewhere_is_no_time_here(
    model: StitchedViT, change: dict[str, Any], message: str
) -> None:
    profile = profile_of(model)
    model.profile = dataclasses.replace(
        profile, setting=dataclasses.replace(profile.setting, **change)
    )
    with pytest.raises(ValueError, match=f"profile must be of this device and dtype.*{message}"):
        model.select("50 ms")
    assert model.select(1.0).route.id == 2


def test_a_batch_size_that_was_not_measured(model: StitchedViT) -> None:
    with pytest.raises(ValueError, match=r"measured \(1, 4\), got 5"):
        model.select("50 ms", 5)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        model.select("50 %", 0)
    with pytest.raises(TypeError, match="float"):
        model.select("50 ms", 1.5)
    with pytest.raises(ValueError, match=r"measured \(1, 4\), got 5"):
        model(torch.zeros(5, 3, 8, 8), budget="50 ms")


@pytest.mark.parametrize(
    ("scores", "error", "message"),
    [
        ({}, ValueError, "scores must hold at least one route, got none"),
        ({0: 1.0, 3: 1.0}, ValueError, "route id must be in 0–2 or 4–4, got 3"),
        ({0: float("nan")}, ValueError, "scores must be finite, got nan for route 0"),
        ({0: "good"}, TypeError, "scores must be numbers, got 'good' for route 0"),
        ({"0": 1.0}, TypeError, "route id must be an integer, got '0', a str"),
        ([1.0, 2.0], TypeError, "scores must be an evaluation or a mapping .* got list"),
    ],
)
def test_wrong_scores_leave_those_that_were(
    model: StitchedViT, scores: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        model.scores = scores
    assert model.scores == SCORES


def test_a_profile_of_another_model_leaves_the_one_that_was(model: StitchedViT, make: Make) -> None:
    before = model.profile
    for other, message in (
        (make((3, 4)), "depth of the small anchor is 2 here and was 3 when it was measured"),
        (make(rank=5), "rank is 3 here and was 5"),
    ):
        with pytest.raises(ValueError, match=f"profile must be of this model, but .*{message}"):
            model.profile = profile_of(other)
    with pytest.raises(TypeError, match="profile must be a Profile, got dict"):
        model.profile = before.to_json()
    assert model.profile is before


def test_an_evaluation_gives_its_top1(model: StitchedViT) -> None:
    model.scores = SimpleNamespace(
        scores=[SimpleNamespace(id=i, top1=score) for i, score in SCORES.items()]
    )
    assert model.scores == SCORES
    model.scores = None
    model.profile = None
    assert model.scores is None and model.profile is None


def test_they_are_saved_with_the_model(model: StitchedViT, make: Make, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model.save(path)
    restored = make()
    restored.restore(path)
    for again in (StitchedViT.load(path), restored, copy.deepcopy(model)):
        assert again.scores == SCORES
        assert again.profile == model.profile
        assert again.select("22 ms").route.id == 2
    model.scores = model.profile = None
    model.save(path)
    restored.restore(path)
    assert restored.scores is None and restored.profile is None


def test_files_from_before_there_were_any_still_load(model: StitchedViT, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model.save(path)
    tensors, config = checkpoint.read(path)
    for key in ("scores", "profile"):
        del config[key]
    checkpoint.write(path, tensors, config)
    again = StitchedViT.load(path)
    assert again.scores is None and again.profile is None
    model.restore(path)
    assert model.scores is None  # those it had were of other weights


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("scores", [1.0], "'scores' in .* must be dict"),
        ("scores", {}, "scores must hold at least one route"),
        ("scores", {"a": 1.0}, "invalid literal for int"),
        ("scores", {"3": 1.0}, "route id must be in"),
        ("scores", {"0": None}, "scores must be numbers"),
        ("profile", 3, "'profile' in .* must be dict"),
        ("profile", {"format": "?"}, "it must be a mapping with format"),
        ("profile", "other", "rank is 3 here and was 9"),
    ],
)
def test_damaged_ones_are_refused(
    model: StitchedViT, tmp_path: Path, key: str, value: Any, message: str
) -> None:
    path = tmp_path / "model.safetensors"
    model.save(path)
    tensors, config = checkpoint.read(path)
    if value == "other":
        value = json.loads(json.dumps(config[key]))
        value["model"]["rank"] = 9
    config[key] = value
    checkpoint.write(path, tensors, config)
    before = model.profile
    for read in (model.restore, StitchedViT.load):
        with pytest.raises(ValueError, match=message) as refusal:
            read(path)
        assert str(path) in str(refusal.value)
    assert model.scores == SCORES and model.profile is before
