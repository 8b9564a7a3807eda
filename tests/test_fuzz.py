"""The fuzz of checkpoints, ONNX files and images (``python -m tests.fuzz``) finds nothing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def fuzz(*arguments: str) -> str:
    command = [sys.executable, "-m", "tests.fuzz", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fuzz() -> None:
    printed = fuzz("--cases", "180")
    for subject in ("loader", "lint", "images"):
        assert f"{subject}: 60 cases" in printed


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_fuzz_much() -> None:
    assert "10000 cases" in fuzz("--cases", "10000")
