from collections.abc import Iterator

import pytest
import torch

from snkernels.backends import use_backend
from snkernels.kernels import native

ISAS = ("avx512", "avx2", "portable")


@pytest.fixture(params=["torch", *(f"cpu-{isa}" for isa in ISAS), "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every backend that runs CPU tensors, the compiled one once per instruction set."""
    name, _, isa = request.param.partition("-")
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


@pytest.fixture
def nan_filled() -> Iterator[None]:
    """Fresh memory is NaN, so that an element nobody wrote shows."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(1).isnan().all()
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)
