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
    ("dtype", "width", "stages", "rows", "in_features", "out_features", "clusters"),
    [
        ("bfloat16", 128, 6, 200, 384, 1024, 1),  # S → L
        ("bfloat16", 96, 5, 500, 384, 384, 2),  # a ring of two bands
        ("float16", 64, 5, 300, 512, 384, 1),  # all the steps that there may be
        ("bfloat16", 128, 2, 400, 136, 768, 2),  # ragged K, the shortest ring
        ("float16", 128, 2, 700, 64, 264, 2),  # a last slice of 8 columns
        ("float16", 96, 2, 1, 8, 8, 1),
        ("bfloat16", 64, 2, 129, 64, 512, 1),  # more bands than stages
    ],
)
def test_every_tile_and_phase(
    run: Path,
    dtype: str,
    width: int,
    stages: int,
    rows: int,
    in_features: int,
    out_features: int,
    clusters: int,
) -> None:
    """y, LN(y), mean and 1/σ to within rounding, whatever lands in whatever order."""
    for seed in range(3):
        check(run, dtype, width, stages, rows, in_features, out_features, clusters, seed)


@pytest.mark.parametrize(
    ("dtype", "width", "in_features", "out_features", "clusters", "offsets"),
    [
        ("bfloat16", 128, 192, 1024, 1, [0, 130]),  # one group
        ("float16", 96, 136, 384, 2, [0, 37, 37, 300]),  # unequal, one of them empty
        ("bfloat16", 128, 64, 768, 2, [0, 129, 138, 266, 267]),  # ragged ends
        ("float16", 96, 72, 96, 1, [0, 64, 129, 130, 131, 300]),  # some for one consumer alone
        ("float16", 96, 8, 8, 3, list(range(0, 33 * 9, 9))),  # as many as a launch takes
        ("float16", 96, 8, 264, 2, [0] * 6),  # nothing but empty ones
    ],
)
def test_groups(
    run: Path,
    dtype: str,
    width: int,
    in_features: int,
    out_features: int,
    clusters: int,
    offsets: list[int],
) -> None:
    """Each group to within rounding, and bit for bit what the single op makes of its rows."""
    rows = max(offsets[-1], 1)
    for seed in range(3):
        check(run, dtype, width, 2, rows, in_features, out_features, clusters, seed, offsets)


@pytest.mark.parametrize("offsets", [[-7, 40, 170, 900], [2, 9, 9, 138], [140, 3, 140, 0]], ids=str)
def test_offsets_that_nobody_could_check(run: Path, offsets: list[int]) -> None:
    """Whatever they are, a row outside the groups is not written, nor one outside the matrix."""
    check(run, "bfloat16", 128, 2, 140, 72, 200, 2, 0, offsets)


def check(run: Path, *arguments: object) -> None:
    texts = [",".join(map(str, a)) if isinstance(a, list) else str(a) for a in arguments]
    result = subprocess.run([run, *texts], capture_output=True, text=True)
    assert result.returncode == 0, (texts, result.stdout, result.stderr)


def test_obstacles(monkeypatch: pytest.MonkeyPatch) -> None:
    if native.CUDA_VERSION is None:
        pytest.skip("the compiled module was built without CUDA")

    def obstacle(dtype: torch.dtype, in_features: int, out_features: int) -> str:
        x = torch.empty(3, in_features, dtype=dtype)
        return str(native.cluster_kernel_obstacle(x, [torch.empty(out_features, in_features)]))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert obstacle(torch.bfloat16, 384, 1024) == "None"
    assert obstacle(torch.float16, 8, 1024) == "None"
    assert "not torch.float32" in obstacle(torch.float32, 384, 1024)
    assert "not 1024 from 390" in obstacle(torch.float16, 390, 1024)
    assert "too large for it: 384 features from 1024" in obstacle(torch.float16, 1024, 384)
    assert "too large for it: 1280 features from 384" in obstacle(torch.float16, 384, 1280)
    x = torch.empty(3, 8).half()
    assert "is the identity" in str(native.cluster_kernel_obstacle(x, [None]))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert "9.0, not on 8.0" in obstacle(torch.bfloat16, 384, 1024)
    done = native.cuda_stitch_layer_norm(
        x, torch.empty(8, 8), None, None, None, 1.0, None, None, 1e-6
    )
    assert done is None


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize(
    ("in_features", "out_features", "width", "slices"),
    [(384, 1024, 128, 8), (384, 768, 96, 8), (384, 384, 96, 4), (192, 384, 96, 4)],
)
def test_which_kernel_stitches_from_narrow_anchors(
    in_features: int, out_features: int, width: int, slices: int, grouped: bool
) -> None:
    """W and a ring of two bands fit into the chip."""
    if native.CUDA_VERSION is None:
        pytest.skip("the compiled module was built without CUDA")
    chosen = native._C.cuda_sm90_kernel_for(in_features, out_features, grouped)
    assert chosen[:2] == (width, slices)
    stages, shared = chosen[2:]
    steps = -(-in_features // 128)
    assert 2 * steps <= stages < 3 * steps
    assert 128 * (steps * width + stages * 64) * 2 < shared <= 227 * 1024
