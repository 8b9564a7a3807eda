"""The user's store: checkpoints that ``qzoo build`` and ``qzoo train`` make by name, found again by name.

``QZOO_HOME`` names its folder. By default that is ``qzoo`` in the user's data folder: ``$XDG_DATA_HOME`` or
``~/.local/share``, on macOS ``~/Library/Application Support``, on Windows ``%LOCALAPPDATA%``.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from qzoo.registry import is_name


def home() -> Path:
    """Return the store's folder, which need not exist."""
    folder = os.environ.get("QZOO_HOME")
    if folder:
        return Path(folder).expanduser().absolute()
    return _data_folder() / "qzoo"


def checkpoint_folder(name: str) -> Path:
    """Return the folder that a checkpoint of this name is written to, and looked for in."""
    return home() / "checkpoints" / name


def stored() -> dict[str, Path]:
    """List the folders of the store's checkpoints, by name; one of another name or without weights is none."""
    folders = (path.parent for path in sorted((home() / "checkpoints").glob("*/config.json")))
    return {f.name: f for f in folders if is_name(f.name) and (f / "model.safetensors").is_file()}


def _data_folder() -> Path:
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Application Support"
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
