"""The Triton kernels as compiled for GPUs, in processes of their own: this one interprets them."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")

from snkernels.kernels import native
from snkernels.kernels.report import __main__ as command
from snkernels.kernels.report.builds import Build, Launch, faults


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True, check=False
    )


KERNELS = {
    f"_{name}_kernel"
    for name in (
        "merge",
        "normalize",
        "normalize_backward",
        "outer",
        "project_groups",
        "sum_groups",
        "sum_partials",
        "sum_rows",
    )
}


# Compiles what is launched, for a chip that is not there.
BUILD = """
import triton
from snkernels.kernels.report import builds, triton_kernels
from snkernels.kernels.triton import launch

def build(kernel, grid, args, options):
    return kernel.warmup(*args, grid=grid, **options)

triton.runtime.driver.set_active(triton_kernels.NoGpu(90))
"""


def test_groups_compile_with_an_identity_and_ranks_of_one() -> None:
    """Sizes of 1 are constants to the compiler, and the identity is a branch of its own."""
    done = run(
        "-c",
        BUILD + "with launch.launches_go_to(build):\n"
        "    for shape in (builds.Shape(64, 64, 1), builds.Shape(1, 1, 1)):\n"
        "        numbers = builds.DTYPES['fp16']\n"
        "        triton_kernels.launch_groups(shape, numbers, groups=2, identity=True)\n",
    )
    assert done.returncode == 0, done.stderr


def test_exact_products_of_a_block_have_sums_of_their_own() -> None:
    """Else one chain goes over all of K, which the interpreter, that has none, cannot show."""
    done = run(
        "-c",
        BUILD + "def look(kernel, grid, args, options):\n"
        "    ir = build(kernel, grid, args, options).asm['ttgir']\n"
        "    if 'PRECISION' in options:\n"
        "        assert ir.count('tt.dot ') <= ir.count('arith.addf '), ir\n"
        "with launch.launches_go_to(look):\n"
        "    triton_kernels.launch_groups(builds.Shape(64, 64, 64), builds.DTYPES['fp32'])\n",
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(("arch", "dtype"), [(80, "fp16"), (90, "bf16"), (100, "bf16/fp32")])
def test_no_kernel_has_a_fault(tmp_path: Path, arch: int, dtype: str) -> None:
    """No spills, tensor cores, shared memory that there is, 64-bit addresses (see faults).

    Each chip with one dtype: all of them take minutes, and are for the command.
    """
    file = tmp_path / "report.json"
    arguments = f"--few --check --no-cuda --arch {arch} --dtype {dtype} --jobs 1 --json {file}"
    done = run("-m", "snkernels.kernels.report", *arguments.split())
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"sm_{arch}" in done.stdout
    saved = json.loads(file.read_text())
    launches = [Launch(**launched) for build in saved for launched in build["launches"]]
    assert min(launched.floor_us for launched in launches) > 0
    builds = [Build(**build) for build in saved]
    assert {build.kernel for build in builds} == KERNELS
    for build in builds:
        assert not faults(build)
        assert build.ctas_per_sm >= 1
    tiled = [b for b in builds if b.kernel.startswith(("_project", "_outer"))]
    assert min(b.ctas_per_sm for b in tiled) >= (2 if (arch, dtype) == (90, "bf16") else 1)


def test_a_floor_is_of_each_tensor_once_and_of_the_products() -> None:
    """By hand: y = x Wᵀ in two groups, 1000 tokens from 384 to 1024 in bf16, on an H100."""
    done = run(
        "-c",
        """
import dataclasses, json, torch
from snkernels.kernels.report import builds, triton_kernels
from snkernels.kernels.triton import launch
from snkernels.kernels.triton.multi_stitch import multi_stitch_forward

def note(kernel, grid, args, options):
    print(json.dumps(dataclasses.asdict(triton_kernels._launch(kernel, args, "", 90, "bf16"))))

x, w = (torch.empty(s, dtype=torch.bfloat16, device="meta") for s in ((1000, 384), (1024, 384)))
with launch.launches_go_to(note):
    multi_stitch_forward(x, [0, 300, 1000], [w, *[None] * 5] * 2, [1.0] * 2, 1024, False, 0.0)
""",
    )
    assert done.returncode == 0, done.stderr
    launched = Launch(**json.loads(done.stdout))
    assert launched.sizes == {"M": 1000, "groups": 2, "N": 1024, "K": 384}
    # Of each group an address and a scaling beside its W, and three offsets.
    assert launched.bytes == 2 * (1000 * 384 + 2 * 1024 * 384 + 1000 * 1024) + 8 * (2 + 2 + 3)
    assert launched.flops == 2 * 1000 * 1024 * 384
    assert launched.bound == "bytes"
    assert launched.floor_us == round(launched.bytes / 3.35e12 * 1e6, 2)


def test_batch_sizes_compile_nothing_new() -> None:
    """Triton would compile once for each key; the keys are asked for, and not compiled."""
    done = run(
        "-c",
        """
import torch, triton
from triton import knobs
from snkernels.kernels.report import builds, triton_kernels
from snkernels.kernels.triton import launch

keys = set()
knobs.runtime.jit_cache_hook = lambda *, key, fn, **_: keys.add((fn.name, str(key))) or True
triton.runtime.driver.set_active(triton_kernels.NoGpu(90))
warm_up = lambda kernel, grid, args, options: kernel.warmup(*args, grid=grid, **options)

def launch_all(shape, numbers, rows):
    triton_kernels.launch_groups(shape, numbers, rows, groups=1 + rows % 7)
    triton_kernels.launch_norms(shape.out_features, numbers, rows)

with launch.launches_go_to(warm_up):
    for numbers in (builds.DTYPES["bf16"], builds.DTYPES["fp32"], builds.DTYPES["bf16/fp32"]):
        for shape in builds.FEW:
            launch_all(shape, numbers, 197)
            seen = len(keys)
            for rows in (1, 2, 15, 16, 17, 50, 64, 127, 128, 256, 1000, 4097, 12608, 3_000_000):
                launch_all(shape, numbers, rows)
                assert len(keys) == seen, (rows, sorted(keys)[-1])
print(len(keys))
""",
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 20


def test_a_check_that_sees_no_compiled_module_fails(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As where the sources shadow the package that was installed; nothing is compiled here."""
    nothing = SimpleNamespace(apply_async=lambda *_: SimpleNamespace(get=list))
    pool = SimpleNamespace(Pool=lambda *_, **__: contextlib.nullcontext(nothing))
    monkeypatch.setattr(command, "get_context", lambda _: pool)
    monkeypatch.setattr(command.knobs.runtime, "interpret", False)
    monkeypatch.setattr(native, "IMPORT_ERROR", "no such file")
    assert command.main(["--check"]) == 1
    assert "were not seen: no such file" in capsys.readouterr().err
    assert command.main([]) == command.main(["--check", "--no-cuda"]) == 0


def test_the_interpreter_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command.knobs.runtime, "interpret", True)
    with pytest.raises(SystemExit):
        command.main(["--few"])
