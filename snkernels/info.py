"""``snkernels info``: what is installed and built here, and which backend runs each op, and why."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version

import torch

import snkernels.ops  # noqa: F401  (importing them fills OFFERED)
from snkernels import backends
from snkernels.kernels import native
from snkernels.ops.library import OFFERED
from snkernels.text import aligned

Rows = list[tuple[str, ...]]

_DTYPE = torch.float32


def report() -> str:
    """Versions, compiled module and devices; the backend of each op on each device, and why."""
    devices = ["cpu", *["cuda"] * torch.cuda.is_available()]
    forced = backends.forced_backend()
    scope = "float32" if forced is None else f"float32, with {forced} forced"
    return "\n\n".join(
        (
            aligned([*_versions(), *_compiled(), *_devices()]),
            f"Which backend runs each op, for {scope}:\n" + aligned(_choices(devices)),
            "What SNKERNELS_BACKEND or snkernels.use_backend can force:\n"
            + aligned(_forceable(devices)),
        )
    )


def _versions() -> Rows:
    def installed(package: str) -> str:
        try:
            return version(package)
        except PackageNotFoundError:
            return "not installed"

    packages = ("torch", "triton", "numpy")
    return [
        ("snkernels", installed("snkernels")),
        ("python", platform.python_version()),
        *((package, installed(package)) for package in packages),
    ]


def _compiled() -> Rows:
    if native.IMPORT_ERROR is not None:
        return [("compiled module", f"missing: {native.IMPORT_ERROR}")]
    C = native._C
    cuda = f"CUDA {C.cuda_version} for {C.cuda_archs}" if C.cuda_version else "no CUDA"
    openmp = "OpenMP" if C.openmp else "no OpenMP"
    others = ", ".join(isa for isa in C.cpu_isas() if isa != C.cpu_isa())
    return [
        ("compiled module", f"compiler {C.compiler}, {openmp}, {cuda}"),
        ("its CPU code", f"{C.cpu_isa()} in use" + (f"; {others} also run here" if others else "")),
    ]


def _devices() -> Rows:
    rows: Rows = [("cpu", f"{os.cpu_count()} processors, {torch.get_num_threads()} threads")]
    for i in range(torch.cuda.device_count()):
        of = torch.cuda.get_device_properties(i)
        memory = f"{of.total_memory / 2**30:.0f} GiB"
        rows.append((f"cuda:{i}", f"{of.name}, sm_{of.major}{of.minor}, {memory}"))
    if len(rows) == 1:
        built = "torch is built without CUDA" if torch.version.cuda is None else "torch finds none"
        rows.append(("cuda", f"no device: {built}"))
    return rows


def _choices(devices: Iterable[str]) -> Rows:
    rows: Rows = []
    for op, offered in OFFERED.items():
        for device in devices:
            try:
                choice = backends.choose(op, offered, device, _DTYPE)
            except RuntimeError as error:
                rows.append((f"  {op}", device, "none", str(error)))
            else:
                rows.append((f"  {op}", device, choice.backend, choice.reason))
    return rows


def _forceable(devices: Iterable[str]) -> Rows:
    return [
        (f"  {backend}", device, f"no: {obstacle}" if obstacle else "yes")
        for backend in backends.BACKENDS
        for device in devices
        for obstacle in [backends.obstacle(backend, device, _DTYPE)]
    ]
