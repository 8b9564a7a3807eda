"""The native library is loaded where it was built, and everything works without it."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from qzoo.quant import native, ops
from qzoo.quant.ops.schema import references

WITHOUT = """
import sys, warnings
import torch
{prepare}
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from qzoo.quant import native, ops
    native.load()
warned = [str(w.message) for w in caught if "native CPU kernels" in str(w.message)]
y = ops.fake_quantize(torch.tensor([0.3, -2.0, 0.9]), torch.tensor(1.0))
print(native.is_loaded(), len(warned), y.tolist(), native.describe()["cpu"]["reason"])
"""
MISSING = "import importlib.util; importlib.util.find_spec = lambda name: None"


def run(prepare: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(prepare=prepare)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_library_that_was_built_is_loaded() -> None:
    built = importlib.util.find_spec("qzoo._C") is not None
    assert native.is_loaded() == (built and os.environ.get("QZOO_NATIVE", "1") != "0"), native.describe()


@pytest.mark.skipif(
    os.environ.get("QZOO_REQUIRE_NATIVE") != "1", reason="the native library is optional here"
)
def test_library_is_there_where_it_is_required() -> None:
    assert native.is_loaded(), native.describe()


def test_describe_gives_a_reason_for_each_device() -> None:
    status = native.describe()
    assert set(status) == {"cpu", "cuda"}
    for device, entry in status.items():
        assert entry["loaded"] == native.is_loaded(device)
        assert entry["reason"]


@pytest.mark.skipif(not native.is_loaded(), reason="without the native library the reference runs")
@pytest.mark.parametrize("name", sorted(references))
def test_native_kernels_serve_the_cpu(name: str) -> None:
    assert torch._C._dispatch_has_kernel_for_dispatch_key(f"qzoo::{name}", "CPU")


VALUES = ops.fake_quantize(torch.tensor([0.3, -2.0, 0.9]), torch.tensor(1.0)).tolist()


def test_switched_off_by_the_environment() -> None:
    assert run("", QZOO_NATIVE="0").startswith(f"False 0 {VALUES}")


def test_one_warning_when_it_is_missing() -> None:
    out = run(MISSING, QZOO_NATIVE="1")
    assert out.startswith(f"False 1 {VALUES}")
    assert "not built" in out


def test_loading_again_changes_nothing() -> None:
    before = native.describe()
    native.load()
    assert native.describe() == before
    assert torch.equal(ops.fake_quantize(torch.ones(2), torch.tensor(1.0)), torch.ones(2))
