"""Builds the native kernels where that is possible; everything else is in pyproject.toml.

QZOO_REQUIRE_NATIVE=1   fail instead of installing without the CPU kernels
QZOO_BUILD_NATIVE=0     do not build any kernels
QZOO_BUILD_CUDA=1       build the CUDA kernels too (a second library, so that the first loads on any torch)
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

REQUIRE_NATIVE = os.environ.get("QZOO_REQUIRE_NATIVE") == "1"
BUILD_NATIVE = os.environ.get("QZOO_BUILD_NATIVE", "1") != "0"
BUILD_CUDA = os.environ.get("QZOO_BUILD_CUDA") == "1"

# Kernels built against the stable ABI of this release load on it and on every later one.
TORCH_TARGET = "0x020a000000000000"
DEFINES = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("Py_LIMITED_API", "0x030A0000")]
# No contraction: a fused multiply-add would round differently from the reference.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]


def cpu_extension() -> Extension:
    """The CPU library, `qzoo/_C.abi3.so`."""
    from torch.utils.cpp_extension import include_paths, library_paths

    return Extension(
        "qzoo._C",
        sources=["csrc/module.cpp", "csrc/quant_cpu.cpp", "csrc/calib_cpu.cpp"],
        depends=[str(header) for header in sorted(Path("csrc").glob("*.h"))],
        include_dirs=["csrc", *include_paths()],
        library_dirs=library_paths(),
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=DEFINES,
        extra_compile_args=FLAGS,
        language="c++",
        py_limited_api=True,
        optional=not REQUIRE_NATIVE,
    )


def extensions() -> list[Extension]:
    """What to build: nothing when it is switched off or torch cannot be imported here."""
    if not BUILD_NATIVE:
        return []
    try:
        import torch  # noqa: F401
    except ImportError as error:
        if REQUIRE_NATIVE:
            raise
        print(f"qzoo: torch cannot be imported ({error}); installing without native kernels", file=sys.stderr)
        return []
    return [cpu_extension()]


setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": build_ext},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
