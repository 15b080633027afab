"""What the CUDA kernels of the compiled module became, read from the module: no GPU is needed."""

import importlib.util
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from snkernels.kernels import native

_RESERVED = 1024  # bytes of shared memory that the system takes, counted as SHARED from sm_90 on


@dataclass(frozen=True)
class Resources:
    """What a kernel takes.

    Attributes:
        registers: of a thread.
        stack: bytes of local memory of a thread, where spills go too.
        shared: bytes; what is asked for at launch is not in the module, and not counted.
        threads: the most that the kernel may be launched with.
    """

    registers: int
    stack: int
    shared: int
    threads: int


def obstacle() -> str | None:
    """Why there is nothing to read; None if there is."""
    if native.IMPORT_ERROR is not None:
        return f"the compiled module did not import: {native.IMPORT_ERROR}"
    if native.CUDA_VERSION is None:
        return "the compiled module was built without CUDA"
    if cuobjdump() is None:
        return "cuobjdump is not installed: it comes with the CUDA toolkit and with triton"
    return None


def cuobjdump() -> str | None:
    """The tool of a CUDA toolkit, or the one in Triton's wheel."""
    triton = importlib.util.find_spec("triton")
    bundled = Path(triton.origin or "").parent / "backends/nvidia/bin" if triton else None
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=str(bundled))


def resources() -> dict[str, Resources]:
    """Those of each kernel, by "architecture mangled name"."""
    threads = {
        name: int(found[1], 16)
        for name, text in _dump(r"\.nv\.info\.(\S+)", "-elf").items()
        if (found := re.search(r"EIATTR_MAX_THREADS\s+Format:\s+\w+\s+Value:\s+(\w+)", text))
    }
    kernels = {}
    for name, text in _dump(r"\s*Function\s*:?\s+([^\s:]+)", "--dump-resource-usage").items():
        used = {key: int(value) for key, value in re.findall(r"([A-Z]+):(\d+)", text)}
        reserved = _RESERVED if int(re.findall(r"\d+", name)[0]) >= 90 else 0
        kernels[name] = Resources(
            registers=used["REG"],
            stack=used["STACK"] + used["LOCAL"],
            shared=max(0, used["SHARED"] - reserved),
            threads=threads.get(name, 1024),
        )
    return kernels


def instructions(kernels: Sequence[str] = ()) -> Mapping[str, str]:
    """The machine code of some kernels by mangled name, or of all, which takes about a minute."""
    chosen = ("-fun", ",".join(kernels)) if kernels else ()
    return _dump(r"\s*Function\s*:\s+(\S+)", "-sass", *chosen)


def _dump(heading: str, *arguments: str) -> dict[str, str]:
    """What cuobjdump says under each heading, whose group is a kernel's mangled name."""
    tool = cuobjdump()
    assert tool is not None
    output = subprocess.run(
        [tool, *arguments, native._C.__file__],
        check=True,
        capture_output=True,
        text=True,
        env={"PATH": f"{Path(tool).parent}:/usr/bin:/bin"},  # where it looks for its disassembler
    ).stdout
    sections: dict[str, list[str]] = {}
    architecture, section = "", None
    for line in output.splitlines():
        if match := re.match(r"arch = (\w+)", line):
            architecture, section = match[1], None
        elif match := re.match(heading, line):
            section = sections[f"{architecture} {match[1]}"] = []
        elif section is not None:
            section.append(line)
    return {name: "\n".join(lines) for name, lines in sections.items()}
