"""A record of how well parts predict routes, on a model that takes no time."""

import json
from pathlib import Path

import pytest

from benchmarks import profile_accuracy
from snkernels import PlainViT, StitchedViT


def tiny(name: str) -> StitchedViT:
    assert name == "S-L"
    small, large = (
        PlainViT(8, 4, num_classes=5, embed_dim=width, depth=depth, num_heads=2)
        for width, depth in ((8, 2), (12, 4))
    )
    return StitchedViT(small, large, 2).eval()


def test_the_record_holds_every_route(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_accuracy, "pair", tiny)
    out = tmp_path / "profile" / "cpu.json"
    code = profile_accuracy.main(["--pairs", "S-L", "--rounds", "2", "--out", str(out)])
    record = json.loads(out.read_text())
    result = record["pairs"]["S-L"]
    assert record["command"].endswith(f"--pairs S-L --rounds 2 --out {out}")
    assert [check["route"] for check in result["checks"]] == [0, 1, 2, 4]
    errors = [check["predicted"] / check["measured"] - 1 for check in result["checks"]]
    assert [check["error"] for check in result["checks"]] == errors
    assert result["within"] == sum(abs(error) <= 0.1 for error in errors) / 4
    assert result["error"]["worst"] == max(map(abs, errors))
    assert code == (result["within"] < 0.95)
    table = out.with_suffix(".md").read_text()
    assert table == profile_accuracy.markdown(record)
    assert "| S-L | 4 | " in table and f"| {100 * result['within']:.1f} % |" in table
    assert out.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
