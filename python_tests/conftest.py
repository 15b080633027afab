from collections.abc import Iterator

import device  # noqa: F401 - before anything imports triton
import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> Iterator[None]:
    """Give every test the same random numbers, whichever tests run before it."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield
