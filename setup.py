"""Builds the native kernels where that is possible; everything else is in pyproject.toml.

QZOO_REQUIRE_NATIVE=1   fail instead of installing without the CPU kernels
QZOO_BUILD_NATIVE=0     do not build any kernels
QZOO_BUILD_CUDA=1       build the CUDA kernels too (a second library, so that the first loads on any torch);
                        CUDA_HOME and TORCH_CUDA_ARCH_LIST are honoured
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

REQUIRE_NATIVE = os.environ.get("QZOO_REQUIRE_NATIVE") == "1"
BUILD_NATIVE = os.environ.get("QZOO_BUILD_NATIVE", "1") != "0"
BUILD_CUDA = os.environ.get("QZOO_BUILD_CUDA") == "1"

# Kernels built against the stable ABI of this release load on it and on every later one.
TORCH_TARGET = "0x020a000000000000"
HEADERS = [str(header) for header in sorted(Path("csrc").glob("*.h"))]
# No contraction: a fused multiply-add would round differently from the reference.
FLAGS = ["-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=off"]
NVCC_FLAGS = ["-std=c++17", "-O3", "-fmad=false"]
CUDA_ARCHITECTURES = "7.5;8.0;8.6;8.9;9.0+PTX"


def cpu_extension(torch_root: Path) -> Extension:
    """The CPU library, `qzoo/_C.abi3.so`."""
    return Extension(
        "qzoo._C",
        sources=["csrc/module.cpp", *sorted(str(p) for p in Path("csrc").glob("*_cpu.cpp"))],
        depends=HEADERS,
        include_dirs=["csrc", str(torch_root / "include")],
        library_dirs=[str(torch_root / "lib")],
        libraries=["torch", "torch_cpu", "c10"],
        define_macros=[("TORCH_TARGET_VERSION", TORCH_TARGET)],
        extra_compile_args=FLAGS,
        language="c++",
        py_limited_api=True,
        optional=not REQUIRE_NATIVE,
    )


def find_cuda_home() -> None:
    """Point CUDA_HOME at a whole toolkit: torch looks in the wrong place where nvcc is a wrapper script."""
    candidates = [Path(os.environ["CUDA_HOME"])] if "CUDA_HOME" in os.environ else []
    candidates += [Path("/usr/local/cuda"), *sorted(Path("/usr/local").glob("cuda-*"), reverse=True)]
    for home in candidates:
        if (home / "bin" / "nvcc").exists() and any(home.glob("lib*/libcudart.so")):
            os.environ["CUDA_HOME"] = str(home)
            return


def cuda_extension() -> tuple[Extension, Any]:
    """The CUDA library, `qzoo/_C_cuda.abi3.so`, and the command that knows how to call nvcc."""
    find_cuda_home()
    os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    from torch.utils.cpp_extension import BuildExtension, CUDAExtension

    defines = [("TORCH_TARGET_VERSION", TORCH_TARGET), ("USE_CUDA", None), ("QZOO_NO_CLONES", None)]
    extension = CUDAExtension(
        "qzoo._C_cuda",
        sources=["csrc/module.cpp", *sorted(str(p) for p in Path("csrc").glob("*_cuda.cu"))],
        depends=HEADERS,
        include_dirs=[str(Path("csrc").resolve())],
        define_macros=[*defines, ("QZOO_MODULE", "_C_cuda")],
        extra_compile_args={"cxx": FLAGS, "nvcc": NVCC_FLAGS},
        py_limited_api=True,
    )
    return extension, BuildExtension.with_options(use_ninja=False)


def build() -> dict[str, Any]:
    """What `setup` gets to build: nothing when it is switched off or torch cannot be imported here."""
    if not BUILD_NATIVE:
        return {}
    try:
        import torch
    except ImportError as error:
        if REQUIRE_NATIVE or BUILD_CUDA:
            raise
        print(f"qzoo: torch cannot be imported ({error}): installing without native kernels", file=sys.stderr)
        return {}
    extensions, command = [cpu_extension(Path(torch.__file__).parent)], build_ext
    if BUILD_CUDA:
        cuda, command = cuda_extension()
        extensions.append(cuda)
    return {
        "ext_modules": extensions,
        "cmdclass": {"build_ext": command},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


setup(**build())
