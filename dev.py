#!/usr/bin/env python3
"""One command for each thing one does in this repository, in a virtual environment of its own.

python3 dev.py demo     install, then train and measure a stitched ViT (extra arguments go along)
python3 dev.py test     install, then run all tests (extra arguments go to pytest)
python3 dev.py check    format, lint and type checks
python3 dev.py hooks    run the checks before every commit from now on
"""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.resolve()
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")


def run(*command: str | Path) -> None:
    """Run a command in the repository; end with its status if it fails."""
    print("$", *(str(part).replace(f"{ROOT}{os.sep}", "") for part in command), flush=True)
    status = subprocess.run([str(part) for part in command], cwd=ROOT, check=False).returncode
    if status:
        sys.exit(status)


def install(extras: str) -> None:
    """Build and install the package with some extras, at the versions that CI tests with."""
    if not VENV.exists():
        run(sys.executable, "-m", "venv", VENV)
    # torch is named so that its pinned version is chosen before anything that depends on it.
    torch = next(
        line
        for line in (ROOT / "constraints.txt").read_text().split()
        if line.startswith("torch==")
    )
    run(BIN / "pip", "install", "-q", "-c", "constraints.txt", torch, f".[{extras}]")


def main() -> None:
    """Do what the first argument says."""
    task, *arguments = sys.argv[1:] or ["help"]
    if task == "demo":
        install("demo")
        run(BIN / "snkernels", "demo", *arguments)
    elif task == "test":
        install("dev")
        # Without their dependencies, which the extra names but for torch: torchvision's would
        # replace a CPU build of torch by gigabytes of CUDA.
        run(
            BIN / "pip",
            "install",
            "-q",
            "--no-deps",
            "-c",
            "constraints.txt",
            "timm",
            "torchvision",
        )
        run(BIN / "pytest", *(arguments or ["-n", "auto"]))
    elif task == "check":
        if not (BIN / "ruff").exists():
            install("dev")
        run(BIN / "ruff", "format", "--check", ".")
        run(BIN / "ruff", "check", ".")
        run(BIN / "mypy")
    elif task == "hooks":
        if not (BIN / "pre-commit").exists():
            install("dev")
        run(BIN / "pre-commit", "install")
    else:
        sys.exit(__doc__)


if __name__ == "__main__":
    main()
