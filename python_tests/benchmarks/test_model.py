"""The benchmarks of the model layer on models that take no time."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from benchmarks import model, model_record, rivals, table
from benchmarks.model_record import KIND, Comparison, Memory, ModelRecord
from benchmarks.timing import Spread


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "SHAPES", {"S": (8, 5, 2), "B": (16, 5, 2), "L": (12, 6, 2)})


def test_every_comparison_checks_and_times(capsys: pytest.CaptureFixture[str]) -> None:
    results = [
        model.whole_space("SB", 2, 3),
        model.mixed_batch("SB", 3),
        model.one_route("SB", 3, 2, 3),
        model.stochastic_depth("SB", 2, 3),
    ]
    for one in results:
        assert one.rounds == 3
        assert one.speedup.keys() == one.seconds.keys() - {"ours"}
        assert one.least.keys() <= one.speedup.keys()
    model.measure_memory("SB", 2, 8)
    measured = json.loads(capsys.readouterr().out)
    assert measured["peak_rows"] <= 8


def test_the_whole_space_in_few_rounds_runs_some_routes_singly(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    singly: list[int] = []
    own = model.Ways.own
    monkeypatch.setattr(model.Ways, "own", lambda *args: singly.append(args[1]) or own(*args))
    some = model.whole_space("SL", 2, 2, deal=6)
    assert some.sizes == {"batch": 2, "routes": 22, "singly": len(singly)}
    assert (some.rounds, len(singly)) == (2, 8)
    costs = {route.id: route.flops for route in model.make("SL").routes}
    places = [sorted(costs, key=costs.__getitem__).index(id) for id in singly]
    assert places == [0, 6, 12, 18, 3, 9, 15, 21]
    singly.clear()
    whole = model.whole_space("SL", 2, 3)
    assert sorted(singly) == sorted(costs) and whole.sizes["singly"] == 22


def test_a_run_goes_on_where_a_measurement_breaks(
    record: ModelRecord, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    jobs = [lambda: record.comparisons[1], lambda: 1 // 0, lambda: record.memory[0]]
    made = dataclasses.replace(record, comparisons=[], memory=[])
    assert model.run(jobs, made, tmp_path / "a.json") == 1
    assert ModelRecord.load(tmp_path / "a.json") == dataclasses.replace(
        record, comparisons=record.comparisons[1:]
    )
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_the_largest_case_is_asked_for_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done: list[tuple] = []
    monkeypatch.setattr(model, "whole_space", lambda *args, **options: done.append((args, options)))
    for job in model.jobs(quick=False, large=True):
        job()
    assert done == [(("SL", 8, 2), {"deal": 12})]


@pytest.mark.parametrize("broken", ["release_block", "fused_loop"])
def test_no_speed_of_wrong_results(broken: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right = getattr(rivals, broken)
    monkeypatch.setattr(rivals, broken, lambda *args: right(*args) * 1.001)
    with pytest.raises(AssertionError, match="logits differ by"):
        model.one_route("SB", 3, 2, 3)
    if broken == "release_block":
        with pytest.raises(AssertionError, match="logits differ by"):
            model.whole_space("SB", 1, 2)


def test_arithmetic_is_that_of_the_facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    for pair, whole, prefixes in (("SB", 3.32, 2.706), ("SL", 3.0, 2.701)):
        with torch.device("meta"):
            made = model.make(pair, rank=1)
        rows = [(0, route) for route in made.space]
        total = sum(route.flops for route in made.routes)
        schedule = model.plan(rows, made.space)
        actual = total / model.plan_flops(schedule, made, class_token=False)
        assert actual == pytest.approx(prefixes, abs=1e-3)
        actual = total / model.plan_flops(schedule, made, class_token=True)
        assert actual == pytest.approx(whole, abs=0.02)


@pytest.mark.parametrize("pair", ["SB", "SL"])
def test_a_homogeneous_batch_is_scaled_to_what_the_mixture_computes(
    pair: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    with torch.device("meta"):
        made = model.make(pair, rank=1)
    ids, middle, scale = model.mixture(made)
    ends = [made.space.route(id).segments[-1].anchor for id in ids]
    assert (len(set(ids)), sum(ends)) == (16, 8)

    def cost(routes: list[int]) -> int:
        rows = [(i, made.space.route(id)) for i, id in enumerate(routes)]
        return model.plan_flops(model.plan(rows, made.space), made, class_token=True)

    assert cost(ids) / cost([middle] * 16) == pytest.approx(scale)
    assert 0.95 < scale < 1.05


@pytest.fixture
def record() -> ModelRecord:
    spread = Spread(2.0, 1.5, 2.5)
    return ModelRecord(
        kind=KIND,
        date="2026-11-25T00:00:00+00:00",
        command="python -m benchmarks.model",
        commit="0123456789abcdef",
        dirty=False,
        threads=2,
        machine={"cpu": "C", "load_average": 0.1},
        versions={"torch": "2"},
        comparisons=[
            Comparison(
                section,
                "S-B",
                {"batch": 1},
                3,
                {"ours": spread, "release": spread},
                {"release": spread},
                least,
                {"release": 3.3},
            )
            for section, least in (("whole_space", {"release": 2.5}), ("one_route", {}))
        ],
        memory=[Memory("S-B", 2, 16, 15, 3 * 2**20, 2 * 2**20)],
    )


def test_a_record_its_table_its_plot_and_what_it_missed(
    record: ModelRecord, tmp_path: Path
) -> None:
    path = tmp_path / "a-model.json"
    record.save(path)
    assert ModelRecord.load(path) == record
    table.write(path)
    text = path.with_suffix(".md").read_text()
    assert "| S-B | 1 | release | 2 | 2 | 2.00 | 1.50–2.50 | ≥ 2.5 | 3.30 | 3 |" in text
    assert "| S-B | 2 | 16 | 15 | 3 | 2 |" in text
    readme = "<!-- record:a-model one_route -->\n<!-- /record -->"
    assert "One route as a plan" in table.readme(readme, tmp_path)
    assert "whole space" not in table.readme(readme, tmp_path)
    model_record.plot(path)
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    misses = list(model_record.misses(record))
    assert len(misses) == 2
    assert "2.0 of 2.5 over release" in misses[0]
    assert "max_rows 16" in misses[1]
    dataclasses.replace(record, kind="other").save(path)
    with pytest.raises(ValueError, match="must be a record of kind"):
        ModelRecord.load(path)
