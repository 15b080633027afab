import faulthandler
import os
from collections.abc import Iterator

import pytest
import torch
from cases import OPS
from device import DEVICE

from snkernels.backends import use_backend
from snkernels.kernels import native
from snkernels.ops.library import OFFERED

ISAS = ("avx512", "avx2", "portable")


COMPILED = [f"cpu-{isa}" for isa in ISAS] if DEVICE == "cpu" else ["cuda"]


HANGS = 90.0  # seconds; the slowest tests are those that compile, for some ten


@pytest.fixture(autouse=True)
def _tensors_are_made_on_the_device() -> Iterator[None]:
    """A kernel that never ends on a GPU ends the process, and so counts as a failure."""
    if DEVICE == "cpu":
        yield
        return
    faulthandler.dump_traceback_later(HANGS, exit=True)
    try:
        with torch.device(DEVICE):
            yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture(params=["torch", *COMPILED, "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that runs here and has the op, the one for CPUs once per instruction set."""
    name, _, isa = request.param.partition("-")
    if name not in OFFERED[op := op_of(request.node)]:
        pytest.skip(f"{op} has no {name} kernel")
    if not isa:
        with use_backend(name):
            yield name
        return
    assert native.IMPORT_ERROR is None, native.IMPORT_ERROR
    if isa not in native._C.cpu_isas():
        pytest.skip(f"this machine has no {isa}")
    previous = native._C.cpu_isa()
    native._C.cpu_use_isa(isa)
    try:
        with use_backend(name):
            yield name
    finally:
        native._C.cpu_use_isa(previous)


def op_of(test: pytest.Function) -> str:
    """The op a test is about: its parameter or the parameter's name, or its module's only one."""
    tested = test.callspec.params.values()
    names = [op.library for op in OPS.values() if op in tested]
    names += [name.removesuffix("_backward") for name in OFFERED if name in tested]
    return names[0] if names else test.module.OP


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """SNKERNELS_TEST_KERNEL=op:backend leaves the tests of that kernel, and "none" all others.

    A kernel that reads where it must not breaks all later work of its process on a GPU, so there
    each is tested in a process of its own (benchmarks/gpu.py).
    """
    if (chosen := os.environ.get("SNKERNELS_TEST_KERNEL")) is None:
        return
    kept, left = [], []
    for item in items:
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        kernel = "none"
        if backend in ("triton", "cuda") and backend in OFFERED[op := op_of(item)]:
            kernel = f"{op}:{backend}"
        (kept if kernel == chosen else left).append(item)
    items[:] = kept
    config.hook.pytest_deselected(items=left)


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Fresh memory is NaN, so that an element nobody wrote shows."""
    # A warning is enough: cuBLAS and others would refuse to run, and here it is the filling alone.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
