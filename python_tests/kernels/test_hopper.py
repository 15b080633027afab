"""The source of the Hopper kernel, run on a machine that stands in for the chip.

No GPU is needed: ``hopper/`` replaces the instructions by functions of the host (its machine.h says
what that shows and what not). The scheduler is random; the seeds are fixed.
"""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from snkernels.kernels import native

SOURCES = Path(__file__).parent / "hopper"
CSRC = Path(__file__).parents[2] / "csrc"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if (nvcc := shutil.which("nvcc")) is None:
        pytest.skip("needs the headers of a CUDA toolkit, and nvcc to find them")
    program = tmp_path_factory.mktemp("hopper") / "run"
    options = ["-std=c++17", "-O1", "--cudart=none", f"-I{SOURCES}", f"-I{CSRC}"]
    build = [nvcc, *options, str(SOURCES / "run.cpp"), "-o", str(program)]
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return program


@pytest.mark.parametrize(
    ("dtype", "rows", "in_features", "out_features", "rank", "clusters"),
    [
        ("bfloat16", 130, 192, 1024, 64, 1),  # the width of L: three stages, two bands
        ("bfloat16", 300, 136, 384, 4, 1),  # the width of S: slices of 192; ragged K and rank
        ("float16", 260, 72, 768, 16, 2),  # more bands than clusters
        ("float16", 700, 64, 264, 0, 2),  # no low-rank part; a last slice of 72 columns
        ("float16", 1, 8, 8, 1, 1),
        ("bfloat16", 129, 64, 2048, 0, 1),  # the largest cluster
    ],
)
def test_every_tile_and_phase(
    run: Path,
    dtype: str,
    rows: int,
    in_features: int,
    out_features: int,
    rank: int,
    clusters: int,
) -> None:
    """y, LN(y), mean and 1/σ to within rounding, whatever lands in whatever order."""
    for seed in range(3):
        check(run, dtype, rows, in_features, out_features, clusters, seed, rank)


@pytest.mark.parametrize(
    ("dtype", "in_features", "out_features", "clusters", "ranks", "offsets"),
    [
        ("bfloat16", 192, 1024, 1, [64], [0, 130]),  # one group
        ("float16", 136, 384, 2, [4, 16, 0], [0, 37, 37, 300]),  # unequal, one of them empty
        ("bfloat16", 64, 768, 2, [4, 40, 0, 1], [0, 129, 138, 266, 267]),  # ragged ends
        ("float16", 8, 8, 3, [0] * 32, list(range(0, 33 * 9, 9))),  # as many as a launch takes
        ("float16", 8, 264, 2, [3] * 5, [0] * 6),  # nothing but empty ones
    ],
)
def test_groups(
    run: Path,
    dtype: str,
    in_features: int,
    out_features: int,
    clusters: int,
    ranks: list[int],
    offsets: list[int],
) -> None:
    """Each group to within rounding, and bit for bit what the single op makes of its rows."""
    rows = max(offsets[-1], 1)
    for seed in range(3):
        check(run, dtype, rows, in_features, out_features, clusters, seed, ranks, offsets)


@pytest.mark.parametrize("offsets", [[-7, 40, 170, 900], [2, 9, 9, 138], [140, 3, 140, 0]], ids=str)
def test_offsets_that_nobody_could_check(run: Path, offsets: list[int]) -> None:
    """Whatever they are, a row outside the groups is not written, nor one outside the matrix."""
    check(run, "bfloat16", 140, 72, 200, 2, 0, [4, 16, 0], offsets)


def check(run: Path, *arguments: object) -> None:
    texts = [",".join(map(str, a)) if isinstance(a, list) else str(a) for a in arguments]
    result = subprocess.run([run, *texts], capture_output=True, text=True)
    assert result.returncode == 0, (texts, result.stdout, result.stderr)


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    def obstacle(dtype: torch.dtype, in_features: int, out_features: int, *ranks: int) -> str:
        x = torch.empty(3, in_features, dtype=dtype)
        weights = [torch.empty(out_features, in_features)] * len(ranks)
        lora_As = [torch.empty(rank, in_features) for rank in ranks]
        return str(native.cluster_kernel_obstacle(x, weights, lora_As))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert obstacle(torch.bfloat16, 384, 1024, 64, 0) == "None"
    assert obstacle(torch.float16, 8, 2048, 0) == "None"
    assert "not torch.float32" in obstacle(torch.float32, 384, 1024, 64)
    assert "not 1024 from 390" in obstacle(torch.float16, 390, 1024, 64)
    assert "not 2056 from 384" in obstacle(torch.float16, 384, 2056, 64)
    assert "ranks up to 64, not 65" in obstacle(torch.float16, 384, 1024, 64, 65, 3)
    x = torch.empty(3, 8).half()
    assert "is the identity" in str(native.cluster_kernel_obstacle(x, [None], [None]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "9.0, not on 8.0" in obstacle(torch.bfloat16, 384, 1024, 64)
    with pytest.raises(ValueError, match=r"cannot run: it runs on compute capability 9\.0"):
        native.cuda_stitch_layer_norm(x, torch.empty(8, 8), None, None, None, 1.0, None, None, 1e-6)
