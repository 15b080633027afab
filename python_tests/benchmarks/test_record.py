"""A record on a small op, its JSON, its table and the README's blocks."""

import dataclasses
import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch

from benchmarks import record as recorder
from benchmarks import table
from benchmarks.case import cases
from benchmarks.roofline import Ceilings
from benchmarks.schema import Record
from benchmarks.subject import Bind, Outputs, Shape, Subject, Tensors, subjects

SHAPES = [
    Shape("S→L", {"M": 30, "K": 40, "N": 50, "r": 4}),
    Shape("L→S", {"M": 30, "K": 50, "N": 40, "r": 0}),
]


ARGUMENTS = ["--seconds", "0", "--rounds", "3"]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, Subject]:
    """The real subjects at sizes that take no time, and ceilings that nobody measured."""
    return shrink(monkeypatch)


def shrink(monkeypatch: pytest.MonkeyPatch) -> dict[str, Subject]:
    made = {
        op: dataclasses.replace(subject, shapes=lambda images: SHAPES)
        for op, subject in subjects().items()
        if op in ("stitch", "stitch_layer_norm")
    }
    monkeypatch.setattr(recorder, "subjects", lambda: made)
    monkeypatch.setattr(recorder.roofline, "measure", lambda *_: Ceilings(1e10, 1e11))
    return made


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("results") / "a.record-1.json"
    with pytest.MonkeyPatch.context() as monkeypatch:
        shrink(monkeypatch)
        assert recorder.main(["--out", str(path), *ARGUMENTS]) == 0
    return path


@pytest.fixture
def path(recorded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of a record, its table and its plot, in a results folder that the table reads."""
    shutil.copytree(recorded.parent, tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(table, "RESULTS", tmp_path)
    return tmp_path / recorded.name


def test_a_record_says_what_it_measured_and_where(recorded: Path, path: Path) -> None:
    record = Record.load(path)
    command = ["python", "-m", "benchmarks.record", "--out", str(recorded), *ARGUMENTS]
    assert record.command == shlex.join(command)
    assert record.threads == 1
    assert record.machine["cpu"]
    assert record.versions["torch"]
    assert len(record.cases) == 2 * len(SHAPES) * 3
    for case in record.cases:
        assert case.rounds == 3
        assert case.floor_seconds > 0
        eager, *others = case.entries
        assert eager.name == "eager"
        assert eager.speedup == {}
        for entry in others:
            assert entry.failed is None
            rivals = {e.name for e in case.entries} - {entry.name}
            assert entry.speedup.keys() == (rivals if entry.ours else {"eager"})
            assert entry.seconds.low <= entry.seconds.median <= entry.seconds.high
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    assert path.with_suffix(".md").read_text() == table.markdown(record)


def test_json_round_trip(path: Path, tmp_path: Path) -> None:
    record = Record.load(path)
    record.save(tmp_path / "again" / "record.json")
    assert Record.load(tmp_path / "again" / "record.json") == record
    assert (tmp_path / "again" / "record.json").read_text() == path.read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": 0}, "must be a benchmark record of schema 2"),
        ({"surprise": 1}, "is not a benchmark record.*surprise"),
        ({"cases": [{"op": "stitch"}]}, "is not a benchmark record.*entries"),
    ],
)
def test_a_foreign_file_is_refused(path: Path, change: dict, message: str) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match=message):
        Record.load(path)


def test_the_table_has_a_row_per_shape_and_kernel(path: Path) -> None:
    record = Record.load(path)
    case = record.cases[0]
    ours = next(entry for entry in case.entries if entry.ours)
    text = table.markdown(record)
    cells = next(line.split(" | ") for line in text.splitlines() if line.startswith("| S→L"))
    assert cells[:6] == ["| S→L", "30", "40", "50", "4", "cpu backend"]
    assert f"{ours.speedup['merged'].median:.2f}" == cells[10]
    assert cells[-1] == f"{case.floor_seconds / ours.seconds.median:.0%} |"
    assert text.count("| cpu backend |") == len(record.cases)
    assert "`stitch_layer_norm`" not in table.markdown(record, "stitch")
    with pytest.raises(ValueError, match="'stich'"):
        table.markdown(record, "stich")


def test_the_table_tells_what_a_call_costs_over_the_bare_kernel(
    small: dict[str, Subject], tmp_path: Path
) -> None:
    call = Shape("call", {"M": 1, "K": 8, "N": 8, "r": 4}, calls=2)
    small["stitch"] = dataclasses.replace(small["stitch"], shapes=lambda images: [call])
    path = tmp_path / "call.json"
    assert recorder.main(["--ops", "stitch", "--out", str(path), *ARGUMENTS]) == 0
    text = path.with_suffix(".md").read_text()
    assert "× bare kernel" not in text
    for case in Record.load(path).cases:
        micros = {entry.name: entry.seconds.median * 1e6 for entry in case.entries}
        if case.phase != "forward":
            assert "bare kernel" not in micros
        else:
            ours, bare = micros["cpu backend"], micros["bare kernel"]
            assert f"*call*, cpu backend: {ours - bare:.3g} µs over" in text
            assert f"which takes {bare:.3g} µs" in text


def test_no_speed_for_a_kernel_that_fails(
    small: dict[str, Subject], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = small["stitch"]
    small["stitch"] = dataclasses.replace(
        good, ours=lambda t: lambda: tuple(y + 1 for y in good.ours(t)())
    )
    path = tmp_path / "wrong.json"
    assert recorder.main(["--ops", "stitch", "--out", str(path), *ARGUMENTS]) == 1
    entries = [
        entry
        for case in Record.load(path).cases
        for entry in case.entries
        if case.phase != "inference" and entry.ours
    ]
    assert all("output 0: error" in entry.failed for entry in entries)
    assert all(entry.seconds is None and not entry.speedup for entry in entries)
    text = path.with_suffix(".md").read_text()
    assert text.count("| cpu backend | check failed |") == len(entries)
    assert "output 0: error" in capsys.readouterr().err


def test_a_struck_kernel_never_runs(small: dict[str, Subject], tmp_path: Path) -> None:
    def never(t: Tensors) -> Bind:
        raise AssertionError("it ran")

    small["stitch"] = dataclasses.replace(small["stitch"], ours=never, layer=never)
    path = tmp_path / "struck.json"
    arguments = ["--ops", "stitch", "--out", str(path), *ARGUMENTS]
    assert recorder.main([*arguments, "--struck", "cpu", "torch"]) == 1
    ours = [entry for case in Record.load(path).cases for entry in case.entries if entry.ours]
    assert {entry.failed for entry in ours} == {recorder.TESTS_FAILED}
    assert all(entry.seconds is None for entry in ours)
    assert "| cpu backend | check failed |" in path.with_suffix(".md").read_text()


def test_a_case_that_breaks_loses_nothing_and_another_process_goes_on(
    small: dict[str, Subject], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = small["stitch"]

    def broken(t: Tensors) -> Outputs:
        if len(t["weight"]) == SHAPES[0]["N"]:
            raise RuntimeError("no such memory")
        return good.eager(t)

    path = tmp_path / "parts.json"
    arguments = ["--out", str(path), "--add", *ARGUMENTS]
    small["stitch"] = dataclasses.replace(good, eager=broken)
    assert recorder.main(["--ops", "stitch", *arguments]) == 1
    assert "stitch-S2L-M30" in (said := capsys.readouterr().err)
    assert "RuntimeError: no such memory" in said
    first = Record.load(path)
    assert [case.shape for case in first.cases] == ["L→S"] * 3

    assert recorder.main(["--ops", "stitch_layer_norm", *arguments]) == 0
    both = Record.load(path)
    assert both.cases[:3] == first.cases
    assert [case.op for case in both.cases[3:]] == ["stitch_layer_norm"] * 6
    assert (both.date, both.ceilings) == (first.date, first.ceilings)

    assert recorder.main(["--ops", "stitch_layer_norm", *arguments]) == 0
    again = Record.load(path)
    assert [(c.op, c.shape, c.phase) for c in again.cases] == [
        (c.op, c.shape, c.phase) for c in both.cases
    ]
    for change, message in (
        ({"commit": "another"}, "its commit is another, here it is"),
        ({"machine": {**again.machine, "cpu": "another"}}, "its machine is .*another"),
    ):
        dataclasses.replace(again, **change).save(path)
        with pytest.raises(SystemExit, match=message):
            recorder.main(["--ops", "stitch", *arguments])
        assert len(Record.load(path).cases) == len(again.cases)
    dataclasses.replace(again, machine={**again.machine, "load_average": 9.0}).save(path)
    assert recorder.main(["--ops", "stitch_layer_norm", *arguments]) == 0


def test_sittings_are_one_case(
    small: dict[str, Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each has all rounds, and all cases the best ceilings that were seen."""
    seen = iter([Ceilings(2e10, 1e11), Ceilings(1e10, 3e11), Ceilings(1e10, 2e11)])
    monkeypatch.setattr(recorder.roofline, "measure", lambda *_: next(seen))
    path = tmp_path / "sittings.json"
    arguments = ["--ops", "stitch", "--out", str(path), "--sittings", "3", *ARGUMENTS]
    assert recorder.main(arguments) == 0
    record = Record.load(path)
    assert record.ceilings == Ceilings(2e10, 3e11)
    made = cases(small["stitch"], torch.device("cpu"))
    assert [(c.shape, c.phase) for c in record.cases] == [(c.shape.label, c.phase) for c in made]
    for case, found in zip(made, record.cases, strict=True):
        assert found.rounds == 9
        work = case.subject.work(case.shape, case.phase, case.dtype.itemsize)
        assert found.floor_seconds == record.ceilings.floor(work)
    with pytest.raises(SystemExit):
        recorder.main([*arguments, "--sittings", "0"])


def test_what_failed_in_one_sitting_takes_no_part() -> None:
    first = recorder.Sitting(3, {"eager": [2.0], "a": [1.0], "b": [1.0]}, {}, {"a": None}, {})
    second = recorder.Sitting(3, {"eager": [4.0], "a": [3.0]}, {}, {"a": "less exact"}, {"b": "no"})
    for both in (first.and_then(second), second.and_then(first)):
        assert {name: sorted(v) for name, v in both.samples.items()} == {
            "eager": [2.0, 4.0],
            "a": [1.0, 3.0],
        }
        assert both.failed == {"b": "no"}
        assert both.notes == {"a": "less exact"}


def test_no_case_begins_after_the_limit(
    small: dict[str, Subject], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert recorder.main(["--out", str(tmp_path / "a.json"), "--limit", "0", *ARGUMENTS]) == 1
    assert "no time was left for stitch-S2L-M30" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_an_op_without_a_kernel_for_the_device_is_not_recorded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(recorder.machine, "default_device", lambda: torch.device("cuda"))
    with pytest.raises(SystemExit, match="no kernel of linear runs on cuda"):
        recorder.main(["--ops", "linear"])


def test_preparing_checks_and_records_nothing(small: dict[str, Subject], tmp_path: Path) -> None:
    good = small["stitch"]
    arguments = ["--ops", "stitch", "--prepare", "--out", str(tmp_path / "a.json")]
    assert recorder.main(arguments) == 0
    small["stitch"] = dataclasses.replace(
        good, ours=lambda t: lambda: tuple(y + 1 for y in good.ours(t)())
    )
    assert recorder.main(arguments) == 1
    assert not list(tmp_path.iterdir())


def test_check_finds_what_is_not_as_recorded(path: Path, tmp_path: Path) -> None:
    readme = tmp_path / "README.md"
    block = "<!-- record:a.record-1 stitch -->\n{}<!-- /record -->"
    readme.write_text(f"Before.\n{block.format('')}\nAfter.\n")
    arguments = ["--readme", str(readme)]
    assert table.main([*arguments, "--check"]) == 1
    assert readme.read_text() == f"Before.\n{block.format('')}\nAfter.\n"

    assert table.main(arguments) == 0
    made = block.format(table.markdown(Record.load(path), "stitch"))
    assert readme.read_text() == f"Before.\n{made}\nAfter.\n"
    assert table.main([*arguments, "--check"]) == 0

    for drifted in (readme, path.with_suffix(".md")):
        good = drifted.read_text()
        drifted.write_text(good.replace("cpu backend", "gpu backend", 1))
        assert table.main([*arguments, "--check"]) == 1
        drifted.write_text(good)
    record = Record.load(path)
    dataclasses.replace(record, cases=record.cases[1:]).save(path)
    assert table.main([*arguments, "--check"]) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("<!-- record:nowhere -->\n<!-- /record -->", "'nowhere'"),
        ("<!-- record:a.record-1 -->\nand no end", "malformed"),
    ],
)
def test_a_bad_block_is_refused(path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        table.readme(text, path.parent)


def test_committed_tables_are_those_of_their_records() -> None:
    assert table.main(["--check"]) == 0
