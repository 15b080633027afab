"""What the compiled module is made of, and that it is found wanting nothing of torch."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from snkernels.kernels import native

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def module_path() -> str:
    assert native.IMPORT_ERROR is None, native.IMPORT_ERROR
    return native._C.__file__


def read(*command: str) -> str:
    if shutil.which(command[0]) is None:
        pytest.skip(f"{command[0]} is not installed")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def test_no_torch_symbol(module_path: str) -> None:
    symbols = read("nm", "--dynamic", "--demangle", module_path)
    assert "PyInit__C" in symbols
    assert not re.findall(r"\b(?:at|c10|torch|caffe2)::\S+", symbols)


def test_no_torch_or_cuda_library(module_path: str) -> None:
    needed = read("readelf", "--dynamic", module_path)
    assert "libc.so" in needed
    assert not re.findall(r"NEEDED.*(?:torch|c10|cuda|cudart|nvrtc)", needed)


def test_no_torch_header() -> None:
    sources = [p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cpp", ".cu", ".cuh")]
    assert sources
    for source in sources:
        found = re.findall(r'#\s*include\s*[<"](?:torch|ATen|c10)/', source.read_text())
        assert not found, source


def test_no_native_march() -> None:
    """A wheel must run on other machines than the one that built it."""
    for file in ("CMakeLists.txt", "setup.py"):
        assert "march=native" not in (ROOT / file).read_text()


def test_instruction_sets() -> None:
    isas = native._C.cpu_isas()
    assert isas[-1] == "portable"
    assert native._C.cpu_isa() == isas[0]
    with pytest.raises(ValueError, match="cannot run sse9"):
        native._C.cpu_use_isa("sse9")


def test_cuda_is_reported() -> None:
    if native.CUDA_VERSION is None:
        assert native._C.cuda_archs is None
        assert not hasattr(native._C, "cuda_merge")
    else:
        assert native._C.cuda_archs == "sm_90a"
        assert native._C.cuda_device_count() >= 0


@pytest.mark.parametrize(
    ("setting", "message"),
    [("MAYBE", "SNKERNELS_CUDA must be AUTO, ON or OFF"), ("ON", "no CUDA compiler was found")],
)
def test_a_build_that_cannot_be_says_why(setting: str, message: str, tmp_path: Path) -> None:
    """Configured as setup.py would, on a machine that shows no nvcc."""
    cmake = shutil.which("cmake")
    if cmake is None or shutil.which("ninja") is None:
        pytest.skip("cmake and ninja are needed to configure a build")
    bare = tmp_path / "bin"
    bare.mkdir()
    for tool in ("cmake", "ninja", "c++", "g++", "ar", "ranlib", "ld", "as", "nm", "uname", "sh"):
        if found := shutil.which(tool):
            (bare / tool).symlink_to(found)
    environment = {**os.environ, "PATH": str(bare), "SNKERNELS_CUDA": setting, "CUDACXX": ""}
    build = [sys.executable, "setup.py", "build_ext", "--build-temp", str(tmp_path / "build")]
    result = subprocess.run(
        [*build, "--build-lib", str(tmp_path / "lib")],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
