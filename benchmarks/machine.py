"""What a record says of where it was made."""

import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import numpy
import torch

from snkernels.kernels import native

_CACHES = Path("/sys/devices/system/cpu/cpu0/cache")
_USUAL_CACHE = 32 << 20  # bytes
_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512_bf16", "avx512_vnni", "amx_tile")
_ROOT = Path(__file__).parent.parent


def default_device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def cache_bytes(device: torch.device) -> int:
    """Of the last cache before memory: a GPU's L2, a CPU's L3, or 32 MiB where none is told."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).L2_cache_size
    told = (path.read_text().strip() for path in _CACHES.glob("index*/size"))
    return max((1024 * int(size.removesuffix("K")) for size in told), default=_USUAL_CACHE)


def describe() -> dict[str, Any]:
    """Processor, instruction sets, load of the last minute, GPU."""
    cpuinfo = _cpuinfo()
    flags = cpuinfo.get("flags", "").split()
    gpu = None
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        gpu = {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "L2_bytes": properties.L2_cache_size,
        }
    return {
        "cpu": cpuinfo.get("model name", platform.processor()),
        "cores": os.cpu_count(),
        "flags": [flag for flag in _FLAGS if flag in flags],
        "kernels_use": None if native.IMPORT_ERROR else native._C.cpu_isa(),
        "load_average": round(os.getloadavg()[0], 2),
        "gpu": gpu,
    }


def versions() -> dict[str, str | None]:
    """Of all that a time depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "triton": _installed("triton"),
        "cuda": torch.version.cuda,
        "kernels_cuda": native.CUDA_VERSION,
    }


def commit() -> tuple[str | None, bool | None]:
    """The commit that is checked out, and whether tracked files differ; None without git."""
    head = _git("rev-parse", "HEAD")
    if head is None:
        return None, None
    return head, bool(_git("status", "--porcelain", "--untracked-files=no"))


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=_ROOT, check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def _cpuinfo() -> dict[str, str]:
    """The first processor's entries of /proc/cpuinfo; nothing where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return {}
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}
