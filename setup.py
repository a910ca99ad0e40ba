"""Builds the C++ extension; everything else is in pyproject.toml."""

import shutil
import subprocess
import sys
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension, build_ext
from setuptools import setup

PACKAGES = {"libjpeg": "libjpeg-dev", "libdeflate": "libdeflate-dev"}  # pkg-config name -> Debian/Ubuntu package


def pkg_config(library: str) -> tuple[list[str], list[str]]:
    """Compiler and linker flags of a system library, or exit with one line that says what to install."""
    if shutil.which("pkg-config") is None:
        sys.exit("polydpo_fast: pkg-config was not found; install it with: apt install pkg-config")
    flags = []
    for query in ("--cflags", "--libs"):
        found = subprocess.run(["pkg-config", query, library], capture_output=True, text=True)
        if found.returncode:
            sys.exit(
                f"polydpo_fast: the library {library} was not found; install it with: apt install {PACKAGES[library]}"
            )
        flags.append(found.stdout.split())
    return flags[0], flags[1]


# No contraction to FMA: decoded bytes are the same on every processor (csrc/simd.hpp).
# Nobody looks at floating-point exceptions, and loops vectorise better where they may be spurious.
compile_args = [
    "-O3",
    "-ffp-contract=off",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wall",
    "-Wextra",
    "-Wno-psabi",
]
link_args = ["-pthread"]
for library in PACKAGES:
    cflags, libs = pkg_config(library)
    compile_args += cflags
    link_args += libs

ParallelCompile("POLYDPO_BUILD_JOBS").install()
setup(
    ext_modules=[
        Pybind11Extension(
            "polydpo_fast._C",
            sorted(str(path) for path in Path("csrc").glob("*.cpp")),
            depends=sorted(str(path) for path in Path("csrc").glob("*.hpp")),
            cxx_std=17,
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
    ],
    cmdclass={"build_ext": build_ext},
)
