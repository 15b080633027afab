"""The Triton kernels as compiled for GPUs, in processes of their own: this one interprets them."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

from snkernels.kernels import report

GOOD = report.Build(
    kernel="_project_kernel",
    arch=90,
    dtype="bf16",
    options={"PRECISION": "ieee", "num_warps": 8},
    registers=120,
    spilled=0,
    shared=98304,
    wgmma=4,
    mma_sync=0,
    tcgen05=0,
    serialised=False,
    narrow_addresses=0,
    ctas_per_sm=2,
)


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


def test_no_kernel_has_a_fault(tmp_path: Path) -> None:
    """No spills, wgmma on sm_90, shared memory that there is, 64-bit addresses (see faults)."""
    file = tmp_path / "report.json"
    arguments = "--few --arch 80 90 --dtype bf16 fp16 --json"
    done = run("-m", "snkernels.kernels.report", *arguments.split(), str(file))
    assert done.returncode == 0, done.stdout + done.stderr
    builds = [report.Build(**build) for build in json.loads(file.read_text())]
    kernels = {(build.kernel, build.arch, build.dtype) for build in builds}
    assert kernels == {
        (f"_{kernel}_kernel", arch, dtype)
        for kernel in ("project", "outer", "sum_rows", "row", "layer_norm", "layer_norm_backward")
        for arch in (80, 90)
        for dtype in ("bf16", "fp16")
    }
    for build in builds:
        assert not report.faults(build)
        assert build.ctas_per_sm >= 1
        assert f"sm_{build.arch}" in done.stdout
    tiled = [b for b in builds if b.kernel in ("_project_kernel", "_outer_kernel") and b.arch == 90]
    assert min(b.ctas_per_sm for b in tiled) >= 2


def test_batch_sizes_compile_nothing_new() -> None:
    """Triton would compile once for each key; the keys are asked for, and not compiled."""
    done = run(
        "-c",
        """
import torch, triton
from triton import knobs
from snkernels.kernels import report
from snkernels.kernels.triton import launch

keys = set()
knobs.runtime.jit_cache_hook = lambda *, key, fn, **_: keys.add((fn.name, str(key))) or True
triton.runtime.driver.set_active(report.NoGpu(90))
warm_up = lambda kernel, grid, args, options: kernel.warmup(*args, grid=grid, **options)
with launch.launches_go_to(warm_up):
    for dtype in (torch.bfloat16, torch.float32):
        for shape in report.FEW:
            report.launch_all(shape, dtype, rows=197)
            seen = len(keys)
            for rows in (1, 2, 15, 16, 17, 50, 64, 127, 128, 256, 1000, 4097, 12608, 3_000_000):
                report.launch_all(shape, dtype, rows)
                assert len(keys) == seen, (rows, sorted(keys)[-1])
print(len(keys))
""",
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled": 8}, "spills 8 bytes, but may spill 0"),
        ({"shared": 232449}, "takes 232449 bytes of shared memory of 232448"),
        ({"wgmma": 0, "mma_sync": 64}, "multiplies without wgmma"),
        ({"arch": 80}, "multiplies without mma_sync"),
        ({"serialised": True}, "its wgmma are serialised"),
        ({"narrow_addresses": 3}, "computes 3 addresses in 32 bits"),
    ],
)
def test_faults(change: dict, message: str) -> None:
    assert report.faults(GOOD) == []
    assert report.faults(dataclasses.replace(GOOD, **change)) == [message]


def test_no_tensor_cores_where_none_are_due() -> None:
    assert not report.faults(dataclasses.replace(GOOD, dtype="fp32", wgmma=0))
    assert not report.faults(dataclasses.replace(GOOD, options={"num_warps": 4}, wgmma=0))


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "expected"),
    [
        (8, 128, 0, 2),  # 64 Ki registers are two CTAs of 256 threads with 128 each
        (8, 129, 0, 1),  # registers come to a warp in units of 256, 8 for each thread
        (4, 32, 0, 16),  # 64 warps
        (1, 32, 0, 32),  # 32 CTAs
        (4, 32, 98304, 2),
        (4, 32, 115713, 1),  # 113 KiB and a byte, and 1 KiB of the system's
    ],
)
def test_ctas_per_sm(warps: int, registers: int, shared: int, expected: int) -> None:
    assert report.CHIPS[90].ctas_per_sm(warps, registers, shared) == expected


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report.knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit):
        report.main(["--few"])
