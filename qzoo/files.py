"""Folders that appear whole or not at all: temporary names, then a rename; what can't be renamed at once is locked."""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

from qzoo.errors import CheckpointError, QzooError


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """An empty folder on the same file system as ``folder``, which need not exist; what is left of it goes.

    Raises:
        CheckpointError: ``folder`` is something else than a folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} exists and is no folder")
    scratch = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".tmp", dir=folder.parent))
    try:
        # mkdtemp leaves its folder to the owner alone; another one in it has the permissions that the user wants.
        (scratch / "probe").mkdir()
        scratch.chmod((scratch / "probe").stat().st_mode & 0o777)
        (scratch / "probe").rmdir()
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def remove_scratch(folder: Path) -> None:
    """Remove what killed processes left in a folder that nobody else writes to: its caller holds it exclusively."""
    for left in folder.glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def place(scratch: Path, folder: Path, names: Sequence[str]) -> None:
    """Move files from ``scratch`` to ``folder``: a new folder appears at once, an old one is filled file by file.

    Args:
        names: paths inside of ``scratch``, in the order in which an old folder gets them: what vouches for the
            others goes last.
    """
    for name in names:
        _flush(scratch / name)
    try:
        os.rename(scratch, folder)  # fails where a folder with files is in the way, and only there
    except OSError:
        with exclusive(folder):
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                os.replace(scratch / name, folder / name)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """One process at a time, where the system has advisory locks; others wait."""
    try:
        import fcntl
    except ImportError:  # Windows: hashes still tell a mixture
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def locked(folder: Path, other: str) -> Iterator[None]:
    """Hold a folder for a job of hours, where the system has advisory locks; a second job is refused at once.

    Args:
        other: what runs there, for the message: ``"another training"``.

    Raises:
        QzooError: another process holds it.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    path = folder / ".lock"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor))
        except BlockingIOError:
            ours = False
        if not ours:  # held, or given back and removed between our two calls
            raise QzooError(f"{other} runs in {folder}; wait until it has ended, or choose another folder")
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _flush(path: Path) -> None:
    with path.open("rb") as file:
        os.fsync(file.fileno())
