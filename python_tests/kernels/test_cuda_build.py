"""What nvcc made of the CUDA kernels, read from the compiled module: no GPU is needed."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from snkernels.kernels import native

HOPPER_KERNEL = "stitch_layer_norm_sm90_kernel"


@pytest.fixture(scope="module")
def cuobjdump() -> str:
    """The tool of a CUDA toolkit, or the one in Triton's wheel."""
    if native.CUDA_VERSION is None:
        pytest.skip("the compiled module was built without CUDA")
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin or "").parent / "backends/nvidia/bin" if triton else None
    if found := shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled)):
        return found
    pytest.skip("cuobjdump is not installed")


def dump(cuobjdump: str, *arguments: str) -> dict[str, str]:
    """What cuobjdump says of each kernel, by "architecture mangled name"."""
    # It looks for its disassembler on PATH.
    path = f"{Path(cuobjdump).parent}:/usr/bin:/bin"
    output = subprocess.run(
        [cuobjdump, *arguments, native._C.__file__],
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": path},
    ).stdout
    kernels: dict[str, str] = {}
    architecture = ""
    for line in output.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture = match[1]
        elif match := re.match(r"\s*Function\s*:?\s+([^\s:]+)", line):
            kernels[name := f"{architecture} {match[1]}"] = ""
        elif kernels:
            kernels[name] += line + "\n"
    return kernels


def test_resources(cuobjdump: str) -> None:
    """No kernel spills; the Hopper kernel's registers are those that it redistributes."""
    kernels = dump(cuobjdump, "--dump-resource-usage")
    hopper = [name for name in kernels if HOPPER_KERNEL in name]
    assert len(hopper) == 24  # two dtypes, two widths, three ranks; one group or many
    assert all(name.startswith("sm_90a ") for name in hopper)
    for name, usage in kernels.items():
        used = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", usage)}
        assert used["STACK"] == used["LOCAL"] == 0, name
        # Its own 227 KB are asked for at launch; static_asserts keep to the limit.
        assert used["SHARED"] <= 1024, name
        if name in hopper:
            assert used["REG"] == 168, name


def test_hopper_instructions(cuobjdump: str) -> None:
    """Warpgroup products, multicast copies, registers that change hands; no local memory."""
    # Disassembling all takes a minute; these have every width, rank, dtype and number of groups.
    chosen = [
        name.split()[1]
        for name in dump(cuobjdump, "--dump-resource-usage")
        if re.search(
            HOPPER_KERNEL + r"I(6__halfLi256ELi64ELi1|13__nv_bfloat16Li(192ELi16|256ELi0)ELi32)E",
            name,
        )
    ]
    hopper = dump(cuobjdump, "-sass", "-fun", ",".join(chosen))
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
