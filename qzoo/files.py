"""Folders that appear whole or not at all: temporary names, then a rename; what can't be renamed at once is locked."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from qzoo.errors import CheckpointError, QzooError

_OLD = 600  # seconds: a scratch folder that was only just made need not be locked yet


def write_text(path: Path, text: str) -> None:
    """Write a text file, UTF-8, whole or not at all."""
    write_bytes(path, text.encode("utf-8"))


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, in place of a link rather than through it."""
    temporary = path.with_name(f".{path.name[:200]}.{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("xb") as file:
            file.write(content)
        os.replace(temporary, path)
    except OSError as error:  # of the file that was asked for, not of the temporary one
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def sha256_of(path: Path) -> str:
    """Compute the SHA-256 of a file, in hex digits."""
    return digest_of(path, hashlib.sha256())


def digest_of(path: Path, digest: Any) -> str:
    """Compute the digest of a file, in hex digits, by one of :mod:`hashlib`'s algorithms."""
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return str(digest.hexdigest())


@contextlib.contextmanager
def scratch_beside(folder: Path) -> Iterator[Path]:
    """Make an empty folder on the file system of ``folder``, which need not exist; what is left of it goes.

    Raises:
        CheckpointError: ``folder`` is something else than a folder.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if folder.exists() and not folder.is_dir():
        raise CheckpointError(f"{folder} exists and is no folder")
    with temporary_folder(f".{folder.name}.", folder.parent) as scratch:
        # mkdtemp leaves its folder to the owner alone; another one in it has the permissions that the user wants.
        (scratch / "probe").mkdir()
        scratch.chmod((scratch / "probe").stat().st_mode & 0o777)
        (scratch / "probe").rmdir()
        yield scratch


@contextlib.contextmanager
def temporary_folder(prefix: str = "qzoo-", place: Path | None = None) -> Iterator[Path]:
    """Make an empty folder that goes at the end; those that killed processes left under the same prefix go first.

    Args:
        place: where to make it; by default where the system has its temporary files.
    """
    place = Path(tempfile.gettempdir()) if place is None else place
    _sweep(place, prefix)
    scratch = Path(tempfile.mkdtemp(prefix=prefix, suffix=".tmp", dir=place))
    lock = _try_lock(scratch)
    try:
        yield scratch
    finally:
        if lock is not None:
            os.close(lock)
        shutil.rmtree(scratch, ignore_errors=True)


def _sweep(place: Path, prefix: str) -> None:
    """Remove the user's scratch folders of killed processes; a living one holds the lock of its own."""
    for left in place.glob(f"{glob.escape(prefix)}????????.tmp"):
        try:
            status = left.lstat()
        except OSError:  # gone meanwhile
            continue
        if not stat.S_ISDIR(status.st_mode) or time.time() - status.st_mtime < _OLD or not _is_own(status):
            continue
        lock = _try_lock(left)
        if lock is not None:
            shutil.rmtree(left, ignore_errors=True)
            os.close(lock)


def _is_own(status: os.stat_result) -> bool:
    return not hasattr(os, "getuid") or status.st_uid == os.getuid()


def _try_lock(folder: Path) -> int | None:
    """An open descriptor that holds the folder's lock; None where another has it, or the system has no locks."""
    try:
        import fcntl
    except ImportError:
        return None
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_NOFOLLOW)
    except OSError:  # gone meanwhile, or not ours to open
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        return None
    return descriptor


def remove_scratch(folder: Path) -> None:
    """Remove what killed processes left in a folder that no other one writes to: its caller holds it exclusively."""
    for left in folder.glob(".*.tmp"):
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def place(scratch: Path, folder: Path, names: Sequence[str]) -> None:
    """Move files from ``scratch`` to ``folder``: a new folder appears at once, an old one is filled file by file.

    Of an old folder the last file, which vouches for the others, is there twice meanwhile: under its name, and the
    new one under that of :func:`coming`. Whatever moment the process is killed at, one of the two fits the others.

    Args:
        names: paths inside of ``scratch``, in the order in which an old folder gets them: what vouches for the
            others goes last, what it is judged by just before.

    Raises:
        CheckpointError: the folder has a link in the way that leads out of it.
    """
    for name in names:
        _flush(scratch / name)
    try:
        os.rename(scratch, folder)  # fails where a folder with files is in the way, and only there
    except OSError:
        with exclusive(folder):
            for name in names:
                (folder / name).parent.mkdir(exist_ok=True)
                if not is_inside(folder / name, folder):
                    raise CheckpointError(
                        f"{(folder / name).parent} is a link out of the folder; remove it, or choose another folder"
                    ) from None
            last = folder / names[-1]
            os.replace(scratch / names[-1], coming(last))
            for name in names[:-1]:
                os.replace(scratch / name, folder / name)
            os.replace(coming(last), last)


def coming(path: Path) -> Path:
    """Return where :func:`place` keeps the file that is about to replace ``path``."""
    return path.with_name(f".{path.name}.coming")


def is_inside(path: Path, folder: Path) -> bool:
    """Check whether a path stays inside the folder, with all links on the way followed; ``path`` itself may be one."""
    return path.parent.resolve().is_relative_to(folder.resolve())


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a folder for a ``with`` block, where the system has advisory locks; other processes wait."""
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
