import dataclasses

import pytest

from snkernels.kernels.report.builds import Build, faults
from snkernels.kernels.report.chips import CHIPS

GOOD = Build(
    kernel="_project_groups_kernel",
    arch=90,
    dtype="bf16",
    options={"num_warps": 8},
    registers=120,
    spilled=0,
    shared=98304,
    wgmma=4,
    mma_sync=0,
    tcgen05=0,
    tma=0,
    serialised=False,
    narrow_addresses=0,
    ctas_per_sm=2,
    multiplies=True,
)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spilled": 8}, "spills 8 bytes, but may spill 0"),
        ({"shared": 232449}, "takes 232449 bytes of shared memory of 232448"),
        ({"wgmma": 0, "mma_sync": 64}, "multiplies without wgmma"),
        ({"arch": 80}, "multiplies without mma_sync"),
        ({"serialised": True}, "its wgmma are serialised"),
        ({"narrow_addresses": 3}, "computes 3 addresses in 32 bits"),
    ],
)
def test_faults(change: dict, message: str) -> None:
    assert faults(GOOD) == []
    assert faults(dataclasses.replace(GOOD, **change)) == [message]


def test_no_tensor_cores_where_none_are_due() -> None:
    assert not faults(dataclasses.replace(GOOD, dtype="fp32", wgmma=0))
    assert not faults(dataclasses.replace(GOOD, multiplies=False, wgmma=0))


@pytest.mark.parametrize(
    ("warps", "registers", "shared", "expected"),
    [
        (8, 128, 0, 2),  # 64 Ki registers are two CTAs of 256 threads with 128 each
        (8, 129, 0, 1),  # registers come to a warp in units of 256, 8 for each thread
        (4, 32, 0, 16),  # 64 warps
        (1, 32, 0, 32),  # 32 CTAs
        (4, 32, 98304, 2),
        (4, 32, 115713, 1),  # 113 KiB and a byte, and 1 KiB of the system's
    ],
)
def test_ctas_per_sm(warps: int, registers: int, shared: int, expected: int) -> None:
    assert CHIPS[90].ctas_per_sm(warps, registers, shared) == expected
