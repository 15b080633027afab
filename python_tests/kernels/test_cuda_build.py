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
    assert len(hopper) == 12  # two dtypes, three widths; one group or many
    assert len(kernels) == 12 + 4  # a merge from and to two dtypes each
    for name, used in kernels.items():
        assert name.startswith("sm_90a "), name
        assert used.stack == 0, name
        # What the Hopper kernel asks for at launch is not in the module: see test_report.
        assert used.shared <= (1024 if name in hopper else 19 * 1024), name
        if name in hopper:
            assert (used.registers, used.threads) == (128, 512), name


def test_hopper_instructions() -> None:
    """Warpgroup products, multicast copies, registers that change hands; no local memory."""
    # Disassembling all takes a minute; these have every width, dtype and number of groups.
    chosen = [
        name.split()[1]
        for name in disassembly.resources()
        if re.search(HOPPER_KERNEL + r"I(6__halfLi(64|96)ELi1|13__nv_bfloat16Li128ELi32)E", name)
    ]
    hopper = disassembly.instructions(chosen)
    assert len(hopper) == 3
    for name, code in hopper.items():
        width, _ = (int(number) for number in re.findall(r"Li(\d+)E", name))
        assert code.count(f"HGMMA.64x{width}x16.F32") == 8, name
        assert code.count("UTMALDG.2D.MULTICAST") == 2, name
        assert code.count("UTMALDG.2D") == 4, name
        assert code.count("UBLKCP") == 1, name  # statistics to the other CTAs
        assert "USETMAXREG.DEALLOC" in code and "USETMAXREG.TRY_ALLOC" in code, name
        assert not re.search(r"\b(?:LDL|STL)\b", code), name
        # A product that waits for itself is one that the compiler serialised.
        assert code.count("WARPGROUP.DEPBAR") == 2, name


def test_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for at launch counts; each kernel has the floors of the shapes that run it."""
    report = pytest.importorskip("snkernels.kernels.report")
    chosen = [
        name.split()[1]
        for name in disassembly.resources()
        if re.search(HOPPER_KERNEL + r"I13__nv_bfloat16Li(192|256)ELi(0|64)ELi(1|32)E", name)
        or re.search(r"bias_layer_norm_kernelI(f|6__half)Li32E", name)
    ]
    instructions = disassembly.instructions
    monkeypatch.setattr(disassembly, "instructions", lambda: instructions(chosen))
    shapes = [report.Shape(384, 1024, 64), report.Shape(1024, 384, 64), report.Shape(384, 768, 128)]
    builds = report.cuda_builds([90], shapes)
    found = {(b.kernel, b.dtype, *b.options["template"]): b for b in builds}
    assert len(found) == len(builds) == 10

    one, many = (found[HOPPER_KERNEL, "bf16", 256, 64, groups] for groups in (1, 32))
    # Three stages of 128 rows of x, 256 of W and 64 of A, 128 bytes each. Two sets of the mean and
    # M2 of 128 rows in 8 slices, three vectors, and barriers: 16 and twice 4.
    rest = 2 * 8 * 128 * 8 + 3 * 256 * 4 + (16 + 8) * 8
    assert one.shared == many.shared == 3 * (128 + 256 + 64) * 128 + rest
    assert one.ctas_per_sm == 1
    assert not report.faults(one)
    rows, parameters = report.ROWS, 1024 * 384 + 64 * (384 + 1024) + 3 * 1024
    for build, groups in ((one, 1), (many, report.GROUPS)):
        (launched,) = build.launches
        assert launched.shape == "384→1024 r64"
        assert launched.bytes == 2 * (rows * (384 + 2 * 1024) + groups * parameters) + 8 * rows
        assert launched.flops == 2 * rows * (1024 * 384 + 64 * (384 + 1024))
        assert launched.floor_us == round(launched.bytes / 3.35e12 * 1e6, 2)
    assert found[HOPPER_KERNEL, "bf16", 192, 64, 1].launches[0].shape == "1024→384 r64"
    assert not found[HOPPER_KERNEL, "bf16", 256, 0, 1].launches
    norm = found["bias_layer_norm_kernel", "fp32", 32]
    assert norm.shared == 0
    assert [launched.shape for launched in norm.launches] == ["1024", "768"]
    assert norm.launches[0].bytes == 4 * (3 * rows * 1024 + 3 * 1024) + 8 * rows
