"""What nvcc made of the CUDA kernels, read from the compiled module: no GPU is needed."""

import re

import pytest

from snkernels.kernels import native
from snkernels.kernels.report import cuda_kernels, disassembly
from snkernels.kernels.report.builds import GROUPS, ROWS, Shape, faults

HOPPER_KERNEL = "stitch_layer_norm_sm90_kernel"


@pytest.fixture
def _there_is_something_to_read() -> None:
    if obstacle := disassembly.obstacle():
        pytest.skip(obstacle)


@pytest.mark.usefixtures("_there_is_something_to_read")
def test_resources() -> None:
    """No kernel spills; the Hopper kernel's registers are those that it redistributes."""
    kernels = disassembly.resources()
    hopper = [name for name in kernels if HOPPER_KERNEL in name]
    assert len(hopper) == 12  # two dtypes, three widths; one group or many
    assert len(kernels) == 12 + 4  # a merge from and to two dtypes each
    for name, used in kernels.items():
        assert name.startswith("sm_90a "), name
        assert used.stack == 0, name
        # What the Hopper kernel asks for at launch is not in the module: see test_launches.
        assert used.shared <= (1024 if name in hopper else 19 * 1024), name
        if name in hopper:
            assert (used.registers, used.threads) == (128, 512), name


@pytest.mark.usefixtures("_there_is_something_to_read")
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


@pytest.mark.usefixtures("_there_is_something_to_read")
def test_launches(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked for at launch counts; each kernel has the floors of the shapes that run it."""
    chosen = [
        name.split()[1]
        for name in disassembly.resources()
        if re.search(HOPPER_KERNEL + r"I13__nv_bfloat16Li(64|128)ELi(1|32)E", name)
        or "merge_kernelI6__half" in name
    ]
    instructions = disassembly.instructions
    monkeypatch.setattr(disassembly, "instructions", lambda: instructions(chosen))
    shapes = [
        Shape(384, 1024, 64),
        Shape(384, 1024, 0),
        Shape(192, 1024, 0),  # with less of W there is room for more of x
        Shape(1024, 384, 64),  # too large a W
    ]
    builds = cuda_kernels.cuda_builds([90], shapes)
    found = {(b.kernel, b.dtype, *b.options["template"]): b for b in builds}
    assert len(found) == len(builds) == 6

    for slots, groups in ((1, 1), (32, GROUPS)):
        build = found[HOPPER_KERNEL, "bf16", 128, slots]
        sizes = [native._C.cuda_sm90_kernel_for(k, 1024, slots > 1)[3] for k in (192, 384)]
        assert build.shared == max(sizes) > min(sizes)
        assert build.ctas_per_sm == 1
        assert not faults(build)
        launched, other = build.launches
        assert (launched.shape, other.shape) == ("384→1024", "192→1024")
        parameters = groups * (1024 * 384 + 3 * 1024)
        assert launched.bytes == 2 * (ROWS * (384 + 2 * 1024) + parameters) + 8 * ROWS
        assert launched.flops == 2 * ROWS * 1024 * 384
        assert launched.floor_us == round(launched.bytes / 3.35e12 * 1e6, 2)
        unused = found[HOPPER_KERNEL, "bf16", 64, slots]
        assert (unused.shared, unused.launches) == (0, [])

    for dtype, itemsize, shapes_merged in (
        ("fp16", 2, ["384→1024 r64"]),
        ("fp16/fp32", 4, ["384→1024 r64", "384→1024 r0", "192→1024 r0"]),
    ):
        merge = found["merge_kernel", dtype]
        assert merge.shared == 18432
        assert merge.mma_sync > 0
        assert not faults(merge)
        assert [launched.shape for launched in merge.launches] == shapes_merged * 2
        for launched, groups in (
            (merge.launches[0], 1),
            (merge.launches[len(shapes_merged)], GROUPS),
        ):
            read = itemsize * (1024 * 384 + 64 * (384 + 1024))
            assert launched.bytes == groups * (read + 2 * 1024 * 384)
            assert launched.flops == groups * 2 * 1024 * 384 * 64


@pytest.mark.parametrize(
    ("mangled", "expected"),
    [
        (
            "_ZN3snk4cuda4sm9029stitch_layer_norm_sm90_kernelI13__nv_bfloat16Li128ELi32EEEvNS1_9ArgumentsIXT1_EEE",
            ("stitch_layer_norm_sm90_kernel", [128, 32]),
        ),
        (
            "_ZN3snk4cuda40_GLOBAL__N__fab87f73_8_merge_cu_47519ad212merge_kernelI6__halffEEvNS1_9ArgumentsE",
            ("merge_kernel", []),
        ),
        ("_Z3fooPf", ("_Z3fooPf", [])),
    ],
)
def test_names_of_cuda_kernels(mangled: str, expected: tuple[str, list[int]]) -> None:
    assert cuda_kernels._demangled(mangled) == expected
