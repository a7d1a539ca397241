"""Builds dpdiff_kernels' native library; everything else about the project is in pyproject.toml.

DPDIFF_BUILD_EXTENSION=0   pure Python: every operator runs on its reference (or Triton) implementation
DPDIFF_BUILD_EXTENSION=1   a library that can't be built fails the install
DPDIFF_BUILD_CUDA=1        csrc/cuda too (needs nvcc and a CUDA build of torch); can't be left out either

Without these, a library that can't be built is left out with a warning, and the install succeeds.
"""

import os
import sys
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
ABI_VERSION = "0x020b000000000000"  # the oldest libtorch that the library loads in: 2.11


def extension_arguments() -> dict:
    wanted = os.environ.get("DPDIFF_BUILD_EXTENSION")
    if wanted == "0":
        return {}
    build_cuda = os.environ.get("DPDIFF_BUILD_CUDA", "0") == "1"
    required = wanted == "1" or build_cuda
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension
    except ImportError:
        if required:
            raise
        warn("torch is not installed in the build environment: install it first, and build with --no-build-isolation")
        return {}

    sources = sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/**/*.cpp"))
    flags = ["-O3", "-std=c++17", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-psabi"]
    flags += [f"-DTORCH_TARGET_VERSION={ABI_VERSION}", "-fvisibility=hidden"]
    compile_flags = {"cxx": flags}
    if build_cuda:
        sources += sorted(p.relative_to(ROOT).as_posix() for p in ROOT.glob("csrc/cuda/*.cu"))
        compile_flags["nvcc"] = ["-O3", "-std=c++17", f"-DTORCH_TARGET_VERSION={ABI_VERSION}", "-DUSE_CUDA"]

    class BuildOrWarn(BuildExtension):
        """Leaves the library out, and says so, where it can't be compiled: the reference still runs."""

        def build_extensions(self):
            try:
                super().build_extensions()
            except Exception as error:
                if required:
                    raise
                warn(f"the native library could not be built and is left out ({str(error).splitlines()[0]})")

    extension = CUDAExtension if build_cuda else CppExtension
    library = extension("dpdiff_kernels._C", sources, extra_compile_args=compile_flags, py_limited_api=True)
    library.optional = not required  # setuptools then passes over a file that was not built
    return {
        "ext_modules": [library],
        "cmdclass": {"build_ext": BuildOrWarn},
        "options": {"bdist_wheel": {"py_limited_api": "cp311"}},
    }


def warn(message: str) -> None:
    print(f"\nWARNING: dpdiff_kernels: {message}\n", file=sys.stderr, flush=True)


setup(**extension_arguments())
