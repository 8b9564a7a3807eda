"""Compiles the C++ tests with the sanitizers and runs them; the CUDA source is compiled where nvcc is."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from qzoo.quant.ops.schema import references

ROOT = Path(__file__).resolve().parents[2]
SANITIZERS = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]


def compiler() -> str:
    found = shutil.which(os.environ.get("CXX", "c++"))
    if found is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.mark.parametrize("optimization", ["-O0", "-O3"])
def test_arithmetic_under_the_sanitizers(tmp_path: Path, optimization: str) -> None:
    program = tmp_path / "arithmetic"
    flags = ["-std=c++17", "-ffp-contract=off", "-Wall", "-Wextra", "-Werror", optimization, *SANITIZERS]
    source = ROOT / "tests/csrc/test_arithmetic.cpp"
    built = subprocess.run(
        [compiler(), *flags, f"-I{ROOT / 'csrc'}", str(source), "-o", str(program)],
        capture_output=True,
        text=True,
    )
    if built.returncode and "asan" in built.stderr and "cannot find" in built.stderr:
        pytest.skip("the compiler has no sanitizer libraries")
    assert built.returncode == 0, built.stderr
    done = subprocess.run([str(program)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "passed\n"


@pytest.mark.slow
@pytest.mark.parametrize("source", sorted((ROOT / "csrc").glob("*.cu")), ids=lambda path: path.name)
def test_cuda_source_compiles(tmp_path: Path, source: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    include = Path(torch.__file__).parent / "include"
    command = [nvcc, "-std=c++17", "-fmad=false", "-arch=compute_80", "-DUSE_CUDA", "-DQZOO_NO_CLONES"]
    command += ["-DTORCH_TARGET_VERSION=0x020a000000000000", f"-I{ROOT / 'csrc'}", f"-I{include}"]
    command += ["-c", str(source), "-o", str(tmp_path / "compiled.o")]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr


def test_every_operator_has_a_kernel_on_both_devices() -> None:
    # histograms are searched on the CPU, wherever they lie; the gradient to a range is the reference's on a GPU
    learned = {"fake_quantize_learned_backward", "fake_quantize_affine_learned_backward"}
    on_cpu = {"entropy_costs", "mse_search", *learned}
    for device, without in (("CPU", set()), ("CUDA", on_cpu)):
        suffix = "_cpu.cpp" if device == "CPU" else "_cuda.cu"
        text = "".join(path.read_text() for path in (ROOT / "csrc").glob(f"*{suffix}"))
        assert set(re.findall(r'm\.impl\("(\w+)"', text)) == set(references) - without
