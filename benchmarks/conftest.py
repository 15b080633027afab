"""Makes the trials of a benchmark file from its SUBJECT, and says in the report what ran them."""

from typing import Any

import pytest
import torch

from benchmarks import machine
from benchmarks.case import Trial, cases
from snkernels.kernels import native


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "trial" in metafunc.fixturenames:
        device = machine.default_device()
        trials = [
            Trial(case, entry)
            for case in cases(metafunc.module.SUBJECT, device)
            for entry in case.entries()
        ]
        metafunc.parametrize("trial", trials, ids=str)


def pytest_configure() -> None:
    if native.IMPORT_ERROR is not None:
        raise pytest.UsageError(f"the compiled module did not import: {native.IMPORT_ERROR}")


def pytest_report_header() -> str:
    return ", ".join(f"{name} {value}" for name, value in _setting().items())


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    machine_info |= _setting()


def _setting() -> dict[str, str]:
    return {"torch": torch.__version__, "threads": str(torch.get_num_threads())}
