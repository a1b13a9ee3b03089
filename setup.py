# SPDX-License-Identifier: Apache-2.0
"""Drives CMake; every compiler flag is in CMakeLists.txt.

Environment: SLOPE_CUDA (AUTO|ON|OFF), SLOPE_CUDA_ARCHS (e.g. "90a-real"), MAX_JOBS.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


class CMakeBuild(build_ext):
    """Builds both libraries in one CMake run: slope_ext/_ops.so and slope_ext/_C.*.so."""

    def get_ext_filename(self, fullname: str) -> str:
        # The op library knows no Python, so its name carries no Python tag.
        if fullname.endswith("_ops"):
            return os.path.join("slope_ext", "_ops.so") if "." in fullname else "_ops.so"
        return super().get_ext_filename(fullname)

    def build_extensions(self) -> None:
        output_dir = Path(self.get_ext_fullpath("slope_ext._ops")).resolve().parent
        build_dir = ROOT / "build" / f"cmake-{sys.implementation.cache_tag}"
        options = {
            "SLOPE_PYTHON": sys.executable,
            "Python_EXECUTABLE": sys.executable,
            "SLOPE_OUTPUT_DIR": str(output_dir),
            "SLOPE_CUDA": os.environ.get("SLOPE_CUDA") or "AUTO",
        }
        defines = [f"-D{key}={value}" for key, value in options.items()]
        # -U: back to CMakeLists.txt's default, whatever an earlier build had.
        archs = os.environ.get("SLOPE_CUDA_ARCHS")
        defines.append(f"-DSLOPE_CUDA_ARCHS={archs}" if archs else "-USLOPE_CUDA_ARCHS")
        jobs = os.environ.get("MAX_JOBS", str(os.cpu_count() or 1))
        # The interpreter's own cmake and ninja come before the system's older ones.
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
        configure = ["cmake", "-G", "Ninja", "-S", str(ROOT), "-B", str(build_dir), *defines]
        for command in (configure, ["cmake", "--build", str(build_dir), "--parallel", jobs]):
            subprocess.check_call(command, env={**os.environ, "PATH": path})


setup(
    ext_modules=[Extension("slope_ext._ops", sources=[]), Extension("slope_ext._C", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
