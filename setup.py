"""Builds snkernels._C with CMake; everything else is in pyproject.toml."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Hands the one extension over to CMakeLists.txt, which decides what goes into it."""

    def build_extension(self, ext: Extension) -> None:
        """Configure and build; the module lands where setuptools expects it."""
        import pybind11

        cuda = os.environ.get("SNKERNELS_CUDA", "AUTO").upper()
        if cuda not in ("AUTO", "ON", "OFF"):
            sys.exit(f"SNKERNELS_CUDA must be AUTO, ON or OFF, but it is {cuda!r}")
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = (ROOT / self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            # An earlier build in this folder may remember tools of an environment that is gone.
            "--fresh",
            str(ROOT),
            "-GNinja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target.parent}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DSNKERNELS_CUDA={cuda}",
        ]
        subprocess.run(configure, cwd=build, check=True)
        subprocess.run(["cmake", "--build", "."], cwd=build, check=True)


setup(ext_modules=[Extension("snkernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
