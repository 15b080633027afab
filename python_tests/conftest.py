import sys
from collections.abc import Iterator
from pathlib import Path

import device  # noqa: F401 - before anything imports triton
import pytest
import torch
from hypothesis import HealthCheck, settings

# Processes that tests spawn find the tests by it; last, so that the installed package comes first.
sys.path.append(str(Path(__file__).parents[1]))

torch.set_num_threads(1)

# On a machine that others use too, drawing an example may take seconds now and then.
settings.register_profile("shared", suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Give every test the same random numbers, whichever tests run before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
