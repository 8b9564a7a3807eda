"""Shared fixtures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def imagenet_sample() -> Path:
    """A folder of ImageNet images by WNID, named by ``QZOO_IMAGENET_SAMPLE``; the images can't be distributed."""
    folder = os.environ.get("QZOO_IMAGENET_SAMPLE")
    if not folder:
        pytest.skip("QZOO_IMAGENET_SAMPLE does not name a folder of ImageNet images")
    return Path(folder)
