import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from snkernels.routing.latency import Check, Parts, Profile, Setting
from snkernels.routing.space import StitchingSpace

SETTING = Setting("a processor", 2, "float32", "2.13.0")
SHAPES = {"anchors": [{"depth": 3, "embed_dim": 8}, {"depth": 6, "embed_dim": 16}], "rank": 4}
PARTS = Parts(
    embed=(1.0, 2.0),
    block=(10.0, 20.0),
    exit=(100.0, 200.0),
    switch=(1000.0, 2000.0),
    finish=(10000.0, 20000.0),
)
TWICE = Parts(*(tuple(2 * t for t in pair) for pair in vars(PARTS).values()))


@pytest.fixture
def profile() -> Profile:
    checks = (
        Check(1, 0, predicted=1.02, measured=1.0),
        Check(1, 1, predicted=0.9, measured=1.0),
        Check(4, 1, predicted=4.0, measured=4.0),
    )
    return Profile(SETTING, SHAPES, {1: PARTS, 4: TWICE}, checks)


def test_a_route_is_the_sum_of_its_parts() -> None:
    seconds = {route.id: PARTS.seconds(route) for route in StitchingSpace(3, 6)}
    assert seconds == {
        0: 1 + 2 * 10 + 10000,
        1: 2 + 5 * 20 + 20000,
        2: 1 + 100 + 1000 + 3 * 20 + 20000,  # S0 → L2–5
        3: 1 + 10 + 100 + 1000 + 20 + 20000,  # S0–1 → L4–5
        5: 2 + 20 + 200 + 2000 + 10 + 10000,  # L0–1 → S1–2
        6: 2 + 3 * 20 + 200 + 2000 + 10000,  # L0–3 → S2
        7: 2 + 20 + 200 + 2000 + 100 + 1000 + 20 + 20000,  # L0–1 → S1 → L4–5
        8: 1 + 100 + 1000 + 20 + 200 + 2000 + 10000,  # S0 → L2–3 → S2
    }


def test_between_batch_sizes_it_grows_evenly(profile: Profile) -> None:
    route = profile.space.route(3)
    one = PARTS.seconds(route)
    assert [profile.seconds(route, n) for n in (1, 4)] == [one, 2 * one]
    assert profile.seconds(3, 2) == pytest.approx(one * 4 / 3)
    for beyond in (0, 5):
        with pytest.raises(ValueError, match=rf"those that were measured \(1, 4\), got {beyond}"):
            profile.seconds(route, beyond)
    with pytest.raises(ValueError, match="route id must be in"):
        profile.seconds(4, 1)


def test_errors_of_the_prediction(profile: Profile) -> None:
    assert profile.error() == pytest.approx(0.02)
    assert profile.error(0.95) == profile.error(1) == pytest.approx(0.1)
    for share in (0.0, 1.1):
        with pytest.raises(ValueError, match=r"share must be in \(0, 1\]"):
            profile.error(share)
    text = str(profile)
    assert "a processor, threads: 2, float32, torch 2.13.0" in text
    assert "median 2.0 %, 95 % within 10.0 %, worst 10.0 % (route 1, L0–5, at batch 1" in text
    unchecked = Profile(SETTING, SHAPES, {1: PARTS}, ())
    assert "No route was run whole" in str(unchecked)
    with pytest.raises(ValueError, match="checks must not be empty"):
        unchecked.error()


def test_a_file_gives_it_back(profile: Profile, tmp_path: Path) -> None:
    profile.save(tmp_path / "profile.json")
    assert Profile.load(tmp_path / "profile.json") == profile
    with pytest.raises(FileNotFoundError):
        Profile.load(tmp_path / "none.json")


def at(*keys: Any, value: Any = None) -> Callable[[dict[str, Any]], None]:
    """Put a value into JSON, or take away what is there."""

    def change(values: dict[str, Any]) -> None:
        for key in keys[:-1]:
            values = values[key]
        if value is None:
            del values[keys[-1]]
        else:
            values[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (at("format"), "it must be a mapping with format 'snkernels.Profile/1'"),
        (at("format", value="snkernels.Profile/2"), "it must be a mapping with format"),
        (at("setting"), "KeyError: 'setting'"),
        (at("setting", "threads"), "TypeError: .*threads"),
        (at("setting", "colour", value="red"), "TypeError: .*colour"),
        (at("model", "anchors", value=[]), "TypeError"),
        (
            at("model", "anchors", 0, "depth", value="3"),
            "TypeError: small_depth must be an integer, got '3', a str",
        ),
        (at("model", "rank"), "KeyError: 'rank'"),
        (at("parts", value={}), r"batch sizes must be 1 or more, got \[\]"),
        (at("parts", "0", value={name: [1, 1] for name in vars(PARTS)}), "must be 1 or more"),
        (at("parts", "one", value={}), "invalid literal for int"),
        (at("parts", "1", "exit"), "TypeError: .*exit"),
        (at("parts", "1", "exit", value=[1.0]), r"exit must be two times, got \[1.0\]"),
        (at("parts", "1", "exit", value=[1.0, float("nan")]), "exit must be seconds of 0 or more"),
        (at("parts", "1", "exit", value=[1.0, -1.0]), "exit must be seconds of 0 or more, got -1"),
        (at("parts", "1", "exit", value=[1.0, "x"]), "exit must be seconds of 0 or more, got 'x'"),
        (at("checks", 0, "measured", value=0.0), "cannot have been measured"),
        (at("checks", 0, "batch_size", value=3), "cannot have been measured"),
        (at("checks", 0, "route", value=4), "route id must be in"),
        (at("checks", value=3), "TypeError: .*int"),
    ],
)
def test_a_damaged_file_is_refused(
    profile: Profile, tmp_path: Path, damage: Callable[[dict[str, Any]], None], message: str
) -> None:
    path = tmp_path / "profile.json"
    values = profile.to_json()
    values = json.loads(json.dumps(values))
    damage(values)
    path.write_text(json.dumps(values))
    with pytest.raises(ValueError, match=rf"profile\.json is no profile of ours: .*{message}"):
        Profile.load(path)


def test_other_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "profile.json"
    for content in ("", "[1]", '{"format": "snkernels.Pro'):
        path.write_text(content)
        with pytest.raises(ValueError, match=r"profile\.json is no profile of ours"):
            Profile.load(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"profile\.json is no profile of ours"):
        Profile.load(path)


def test_each_difference_is_named(profile: Profile) -> None:
    profile.check_model(json.loads(json.dumps(SHAPES)))
    other = {"anchors": [SHAPES["anchors"][0], {"depth": 5, "embed_dim": 16}], "rank": 8}
    with pytest.raises(ValueError, match="profile must be of this model") as refusal:
        profile.check_model(other)
    assert "depth of the large anchor is 5 here and was 6 when it was measured" in str(
        refusal.value
    )
    assert "rank is 8 here and was 4" in str(refusal.value)
    assert "embed_dim" not in str(refusal.value)
    profile.check_setting(SETTING)
    with pytest.raises(ValueError, match="profile must be of this device") as refusal:
        profile.check_setting(Setting("another", 2, "bfloat16", "2.13.0"))
    assert "device is 'another' here and was 'a processor'" in str(refusal.value)
    assert "dtype is 'bfloat16'" in str(refusal.value)
    assert "threads" not in str(refusal.value) and "torch" not in str(refusal.value)
