"""What processes do together, in one and in two."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from snkernels import collectives


def fail(rank: int | None) -> None:
    with collectives.agreed():
        if rank is None or collectives.rank() == rank:
            raise KeyError("the disk is gone")


def run_on_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=2)
    assert (collectives.rank(), collectives.world_size()) == (rank, 2)
    assert collectives.gather({"rank": rank}) == [{"rank": 0}, {"rank": 1}]
    ones, twos = collectives.all_gather(torch.full((3,), rank + 1.0, dtype=torch.float64))
    assert ones.tolist() == [1, 1, 1] and twos.tolist() == [2, 2, 2]

    rows = torch.full((2, 3), float(rank))
    transposed = torch.full((3, 2), float(rank)).T
    version = transposed._version
    collectives.broadcast([rows, transposed, torch.empty(0)])
    assert not rows.any() and not transposed.any()
    assert transposed._version > version, "what is cached of it must notice"

    with collectives.agreed():
        pass
    for failing in (0, 1):
        wanted: type[Exception] = KeyError if failing == rank else RuntimeError
        message = "gone" if failing == rank else f"rank {failing} failed: KeyError: 'the disk is"
        with pytest.raises(wanted, match=message):
            fail(failing)
    with pytest.raises(KeyError, match="gone"):
        fail(None)
    dist.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    mp.spawn(run_on_rank, (str(tmp_path),), nprocs=2)


def test_alone() -> None:
    assert (collectives.rank(), collectives.world_size()) == (0, 1)
    assert not collectives.distributed()
    assert collectives.gather("value") == ["value"]
    tensor = torch.randn(3)
    (same,) = collectives.all_gather(tensor)
    assert same is tensor
    collectives.broadcast([tensor])
    with pytest.raises(KeyError, match="gone"):
        fail(0)
