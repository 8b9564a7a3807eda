"""Shared fixtures."""

from __future__ import annotations

import gc
import os
from collections.abc import Generator
from pathlib import Path

import pytest


def pytest_configure(config: pytest.Config) -> None:
    """One thread a worker: the workers share the cores, and torch would give each of them all."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Collect garbage more rarely, and never among the modules and tests that are there from the start: Python's own
    pace takes a fifth of the whole time."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.enable()
        gc.freeze()
        gc.set_threshold(10_000)


@pytest.fixture(autouse=True)
def qzoo_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The user's store, ``QZOO_HOME``: empty for every test, so that none sees or changes the developer's own."""
    folder = tmp_path / "qzoo-home"
    monkeypatch.setenv("QZOO_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """A folder of ImageNet images by WNID, named by ``QZOO_IMAGENET_SAMPLE``; the images can't be distributed."""
    folder = os.environ.get("QZOO_IMAGENET_SAMPLE")
    if not folder:
        pytest.skip("QZOO_IMAGENET_SAMPLE does not name a folder of ImageNet images")
    return Path(folder)
