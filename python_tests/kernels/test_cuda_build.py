"""What nvcc made of the CUDA kernels, read from the compiled module: no GPU is needed."""

import re

import pytest

from snkernels.kernels import disassembly

HOPPER_KERNEL = "stitch_layer_norm_sm90_kernel"


@pytest.fixture(autouse=True)
def _there_is_something_to_read() -> None:
    if obstacle := disassembly.obstacle():
        pytest.skip(obstacle)


def test_resources() -> None:
    """No kernel spills; the Hopper kernel's registers are those that it redistributes."""
    kernels = disassembly.resources()
    hopper = [name for name in kernels if HOPPER_KERNEL in name]
    assert len(hopper) == 24  # two dtypes, two widths, three ranks; one group or many
    assert all(name.startswith("sm_90a ") for name in hopper)
    for name, used in kernels.items():
        assert used.stack == 0, name
        # Its own 227 KB are asked for at launch; static_asserts keep to the limit.
        assert used.shared == 0 or name not in hopper, name
        assert used.shared <= 1024, name
        if name in hopper:
            assert (used.registers, used.threads) == (168, 384), name


def test_hopper_instructions() -> None:
    """Warpgroup products, multicast copies, registers that change hands; no local memory."""
    # Disassembling all takes a minute; these have every width, rank, dtype and number of groups.
    chosen = [
        name.split()[1]
        for name in disassembly.resources()
        if re.search(
            HOPPER_KERNEL + r"I(6__halfLi256ELi64ELi1|13__nv_bfloat16Li(192ELi16|256ELi0)ELi32)E",
            name,
        )
    ]
    hopper = disassembly.instructions(chosen)
    assert len(hopper) == 3
    for name, code in hopper.items():
        width, rank, _ = (int(number) for number in re.findall(r"Li(\d+)E", name))
        assert code.count(f"HGMMA.64x{width}x16.F32") == 4 + 2 * rank // 16, name
        assert code.count(f"HGMMA.64x{rank}x16.F32") == (4 if rank else 0), name
        assert code.count("UTMALDG.2D.MULTICAST") == (2 if rank else 1), name
        assert "USETMAXREG.DEALLOC" in code and "USETMAXREG.TRY_ALLOC" in code, name
        assert not re.search(r"\b(?:LDL|STL)\b", code), name
        # A product that waits for itself is one that the compiler serialised.
        assert code.count("WARPGROUP.DEPBAR") == (2 if rank else 1), name
