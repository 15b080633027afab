import os
import subprocess
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch

import snkernels
from snkernels import backends, cli, demo, profiling
from snkernels.demo import AnchorRecipe, Recipe
from snkernels.kernels import native
from snkernels.models.checkpoint import read, write
from snkernels.ops.library import OFFERED

MINI = Recipe(AnchorRecipe(8, 2, 2, 3), AnchorRecipe(16, 4, 2, 3), rank=2, finetune_steps=3)


def run(*arguments: object) -> int:
    return cli.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder that the command filled with a demo of a few steps."""
    out = tmp_path_factory.mktemp("cli") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "Recipe", lambda: MINI)
        assert run("demo", "--out", out, "--seed", 3) == 0
        yield out


def test_eval_repeats_the_table_of_the_demo(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    csv, plot = tmp_path / "again.csv", tmp_path / "again.png"
    assert run("eval", finished / demo.CHECKPOINT, "--csv", csv, "--plot", plot) == 0
    assert capsys.readouterr().out == (finished / demo.TABLE).read_text(encoding="utf-8")
    assert csv.read_bytes() == (finished / demo.CSV).read_bytes()
    assert plot.read_bytes().startswith(b"\x89PNG")


def test_eval_of_some_routes(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("eval", finished / demo.CHECKPOINT, "--routes", "4,2") == 0
    out = capsys.readouterr().out
    assert "L0–1 → S1" in out and "S0 → L2–3" in out
    assert "L0–3" not in out and "Anchors" not in out


def test_eval_goes_on_after_an_interruption(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "eval.jsonl"
    assert run("eval", finished / demo.CHECKPOINT, "--resume", file) == 0
    table = capsys.readouterr().out
    content = file.read_text()
    file.write_text(content[: len(content) // 2])
    assert run("eval", finished / demo.CHECKPOINT, "--resume", file) == 0
    assert capsys.readouterr().out == table
    assert file.read_text() == content
    assert run("eval", finished / demo.CHECKPOINT, "--routes", "0,1", "--resume", file) == 1
    assert "does not fit: routes was" in capsys.readouterr().err


def test_profile_prints_and_keeps_the_times_of_the_parts(
    finished: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiling, "profile", partial(profiling.profile, seconds=0))
    out = tmp_path / "profile.json"
    arguments = ("profile", finished / demo.CHECKPOINT, "--batch-sizes", "4,1", "--out", out)
    assert run(*arguments) == 0
    kept = snkernels.Profile.load(out)
    assert list(kept.parts) == [1, 4]
    assert capsys.readouterr().out == f"{kept}\n"
    snkernels.StitchedViT.load(finished / demo.CHECKPOINT).profile = kept


def test_demo_replaces_its_own_files(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / demo.CSV).read_bytes()
    assert run("demo", "--out", finished, "--seed", 3) == 0
    assert (finished / demo.CSV).read_bytes() == before
    assert run("demo", "--out", finished, "--seed", 4) == 0
    assert (finished / demo.CSV).read_bytes() != before
    assert run("demo", "--out", finished, "--seed", 3) == 0


def test_what_can_be_put_right_is_one_line(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / demo.CSV).write_text("someone's")
    checkpoint = finished / demo.CHECKPOINT
    truncated = tmp_path / "truncated.safetensors"
    truncated.write_bytes(checkpoint.read_bytes()[:-7])
    silent = tmp_path / "silent.safetensors"
    snkernels.StitchedViT.load(checkpoint).save(silent)
    overflown = tmp_path / "overflown.safetensors"
    tensors, config = read(checkpoint)
    write(overflown, {key: value * torch.nan for key, value in tensors.items()}, config)
    half = tmp_path / "half.safetensors"
    write(half, tensors, {key: value for key, value in config.items() if key != "sampler"})
    for arguments, message in (
        (("demo", "--out", tmp_path), "holds pareto.csv that snkernels demo did not write"),
        (("demo", "--out", checkpoint), "is a file; --out must name a folder"),
        (("eval", tmp_path / "none"), "No such file"),
        (("eval", tmp_path), "is a folder; name the model.safetensors in it"),
        (("eval", truncated), "is truncated or no safetensors file"),
        (("eval", overflown), "logits of route 0 (S0–1) must be finite"),
        (("eval", half), "lacks 'sampler'"),
        (("eval", silent), "does not say what to evaluate it on"),
        (("eval", checkpoint, "--routes", "3"), "route id must be in 0–2 or 4–4, got 3"),
        (("eval", checkpoint, "--csv", tmp_path / "no" / "csv"), "No such file"),
        (("profile", tmp_path / "none"), "No such file"),
        (("profile", truncated), "is truncated or no safetensors file"),
        (
            ("profile", checkpoint, "--batch-sizes", "0"),
            "each of batch_sizes must be at least 1, got 0",
        ),
    ):
        capsys.readouterr()
        assert run(*arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("snkernels: ") and error.count("\n") == 1, error
        assert message in error
    assert (tmp_path / demo.CSV).read_text() == "someone's"


def test_a_missing_extra_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert run("demo", "--out", tmp_path) == 1
    message = "the demo needs scikit-learn and matplotlib: pip install 'snkernels[demo]'"
    assert capsys.readouterr().err == f"snkernels: {message}\n"


def test_a_backend_that_cannot_run_is_refused_before_any_work(
    finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with backends.use_backend("cuda"):
        for arguments in (("demo", "--out", tmp_path), ("eval", finished / demo.CHECKPOINT)):
            assert run(*arguments) == 1
            assert capsys.readouterr().err.startswith("snkernels: backend 'cuda' is forced, but ")
    assert not list(tmp_path.iterdir())


def test_faults_of_ours_keep_their_traceback(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fault(*_: object, **__: object) -> None:
        raise KeyError("a bug")

    monkeypatch.setattr("snkernels.evaluation.evaluate", fault)
    with pytest.raises(KeyError, match="a bug"):
        run("eval", finished / demo.CHECKPOINT)


def test_an_interruption_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "run", interrupt)
    assert run("demo") == 130
    assert capsys.readouterr().err == "snkernels: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "required: COMMAND"),
        (("trian",), "invalid choice: 'trian'"),
        (("eval",), "required: checkpoint"),
        (("eval", "x", "--routes", "1,b"), "invalid comma-separated ids value: '1,b'"),
        (("eval", "x", "--routes", "1,1"), "an id is named twice in '1,1'"),
        (("demo", "--seed", "x"), "invalid int value: 'x'"),
        (("profile", "x", "--batch-sizes", "1,b"), "invalid comma-separated sizes value: '1,b'"),
        (("profile", "x", "--device", "tpu"), "invalid choice: 'tpu'"),
    ],
)
def test_wrong_usage(
    arguments: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        run("--version")
    assert stop.value.code == 0
    assert capsys.readouterr().out == f"snkernels {snkernels.__version__}\n"


def rows(report: str) -> list[list[str]]:
    return [line.split(maxsplit=3) for line in report.splitlines()]


def test_info_says_what_runs_and_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("info") == 0
    report = capsys.readouterr().out
    assert ["torch", torch.__version__] in rows(report)
    assert ["snkernels", snkernels.__version__] in rows(report)
    for op, offered in OFFERED.items():
        choice = backends.choose(op, offered, "cpu", torch.float32)
        assert [op, "cpu", choice.backend, choice.reason] in rows(report)
    assert native.IMPORT_ERROR is None
    assert f"compiler {native._C.compiler}, " in report
    assert (native.CUDA_VERSION or "no CUDA") in report
    assert f"{native._C.cpu_isa()} in use" in report
    assert ["cpu", "cpu", "yes"] in rows(report)
    obstacle = backends.obstacle("cuda", "cpu", torch.float32)
    assert ["cuda", "cpu", "no:", obstacle] in rows(report)


def test_info_shows_a_forced_backend(capsys: pytest.CaptureFixture[str]) -> None:
    with backends.use_backend("cpu"):
        assert run("info") == 0
        report = capsys.readouterr().out
    assert "for float32, with cpu forced" in report
    assert ["stitch", "cpu", "cpu", "forced"] in rows(report)
    with backends.use_backend("cuda"):
        assert run("info") == 0
        report = capsys.readouterr().out
    chosen = {row[0]: row[2] for row in rows(report) if row[1:2] == ["cpu"] and len(row) == 4}
    assert chosen["stitch_layer_norm"] == "none"
    # No such kernel was written for this op, so forcing does not concern it.
    free = backends.choose("stitch", OFFERED["stitch"], "cpu", torch.float32)
    assert chosen["stitch"] == free.backend


def test_info_without_compiled_module_and_triton() -> None:
    code = (
        "import sys; sys.modules.update({'snkernels._C': None, 'triton': None, 'numpy': None});"
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'triton' else find(name, *a);"
        "from snkernels import cli; sys.exit(cli.main(['info']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "compiled module  missing: " in done.stdout
    assert ["triton", "cpu", "no:", "triton is not installed"] in rows(done.stdout)
    assert [row[2] for row in rows(done.stdout) if row[:2] == ["stitch", "cpu"]] == ["torch"]


def test_an_unknown_backend_in_the_environment_is_one_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "snkernels.cli", "info"],
        env={**os.environ, "SNKERNELS_BACKEND": "fast"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("snkernels: SNKERNELS_BACKEND must be one of torch, cpu")
    assert done.stderr.count("\n") == 1
