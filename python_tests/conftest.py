import sys
from collections.abc import Iterator
from pathlib import Path

import device  # noqa: F401 - before anything imports triton
import pytest
import torch

# Processes that tests spawn find the tests by it; last, so that the installed package comes first.
sys.path.append(str(Path(__file__).parents[1]))

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Give every test the same random numbers, whichever tests run before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
