"""Download files from untrusted servers: bounded, checked before they get a name; the token goes to the Hub alone.

The client library, huggingface_hub, believes the Hub that it talks to: it makes a file's name of an ETag and a
folder's name of a commit, writes whatever arrives, and sends the token wherever ``X-Xet-Refresh-Route`` points. So it
only asks (``get_hf_file_metadata``) and transfers (``http_get``, which resumes) here; what the answers may say, and
where files go in its cache, is decided in this module. The cache stays the library's own.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import shutil
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from qzoo.errors import ArgumentError, HubError
from qzoo.files import digest_of, sha256_of, write_text

LARGEST = 1 << 36  # bytes of a file whose size nothing else says
_RESTARTS = 2
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ETAG = re.compile(r"[0-9A-Za-z][0-9A-Za-z_+=.-]{0,127}")


def check_token(token: str | bool | None) -> None:
    """Check that a request can carry a token. Raises ArgumentError; the client's own error would quote it."""
    if isinstance(token, str) and not re.fullmatch("[!-~]+", token):
        raise ArgumentError(
            "the token is empty or holds a space, a line break or another character that none has"
        )


class _BoundedFile:
    """A file to write to that takes so many bytes and no more, whatever a server sends."""

    def __init__(self, file: BinaryIO, limit: int, name: str) -> None:
        self._file, self._limit, self._restarts, self.name = file, limit, 0, name
        self.seek, self.tell, self.flush = file.seek, file.tell, file.flush

    def write(self, data: bytes) -> int:
        if self._file.tell() + len(data) > self._limit:
            raise HubError(f"the server sent more than {self._limit} bytes, the most that this file may have")
        return self._file.write(data)

    def truncate(self) -> int:
        """Start over. The client does where a server can't resume, and would for ever where none ever ends."""
        self._restarts += 1
        if self._restarts > _RESTARTS:
            raise HubError(f"the server broke off {_RESTARTS + 1} times; try again later")
        return self._file.truncate()


@contextlib.contextmanager
def downloaded(
    url: str, folder: Path, limit: int, headers: dict[str, str] | None = None, size: int | None = None
) -> Iterator[Path]:
    """Download under a temporary name in ``folder``, to check and to rename; what is left of it goes.

    Args:
        limit: the most bytes that it may have.
        headers: of the request; without them no token is sent.
        size: bytes that it must have, where they are known.

    Raises:
        HubError: it is larger, or the disk has no room for it.
        Exception: whatever the transfer fails with; see :func:`qzoo.zoo.hub.explain`.
    """
    from huggingface_hub import file_download

    if size is not None and size > limit:
        raise HubError(f"the server offers {size} bytes; this file may have {limit} at most")
    folder.mkdir(parents=True, exist_ok=True)
    if size is not None and (free := shutil.disk_usage(folder).free) < size:
        raise HubError(f"it has {size} bytes, and {folder} has room for {free}; free some space")
    temporary = folder / f".{secrets.token_hex(8)}.tmp"
    try:
        with temporary.open("xb") as file:
            bounded: Any = _BoundedFile(file, limit, str(temporary))
            name = urllib.parse.urlsplit(url).path.rpartition("/")[2]
            file_download.http_get(
                url, bounded, headers=headers, expected_size=size, displayed_filename=name[-40:]
            )
        yield temporary
    finally:
        temporary.unlink(missing_ok=True)


# ---- the Hub's cache ----


def cached_file(repo: str, file: str, revision: str | None, cache_dir: str | Path | None) -> Path | None:
    """Find a file in the cache; None where it is not there."""
    from huggingface_hub import constants, try_to_load_from_cache

    folder = cache_dir or constants.HF_HUB_CACHE
    path = try_to_load_from_cache(repo, file, cache_dir=folder, revision=revision)
    return Path(path) if isinstance(path, str) and os.path.isfile(path) else None


def fits_its_name(path: Path) -> bool | None:
    """Check whether a file of the cache has the content that its blob's name, an ETag, stands for; None where that says
    nothing: it is a link into no ``blobs``, or the ETag is no hash."""
    blob = path.resolve()
    if blob.parent.name != "blobs":
        return None
    return _fits(blob, blob.name)


def download_into_cache(
    repo: str,
    file: str,
    revision: str | None,
    sha256: str,
    *,
    limit: int,
    cache_dir: str | Path | None,
    token: str | bool | None,
) -> Path:
    """Ask for one file of a Hub repository, and download it where the cache has no such content.

    Raises:
        HubError: the answer names what is no content, no commit or too large, or the file is not what it should be.
        Exception: whatever the client library raises; see :func:`qzoo.zoo.hub.explain`.
    """
    from huggingface_hub import constants, file_download
    from huggingface_hub.utils import build_hf_headers

    url = file_download.hf_hub_url(repo, file, revision=revision)
    metadata = file_download.get_hf_file_metadata(url, token=token, library_name="qzoo")
    etag, commit = metadata.etag or "", metadata.commit_hash or ""
    if not _ETAG.fullmatch(etag) or not _COMMIT.fullmatch(commit):
        raise HubError(
            f"the server's answer is none of a Hub's: ETag {etag[:40]!r}, commit {commit[:40]!r}; check HF_ENDPOINT"
        )
    storage = Path(cache_dir or constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"
    place, blob = storage / "snapshots" / commit / file, storage / "blobs" / etag
    if not _is(blob, etag):
        location = metadata.location or url
        own = _origin(location) == _origin(url)
        headers = build_hf_headers(token=token if own else False, library_name="qzoo")
        with downloaded(location, blob.parent, limit, headers, metadata.size) as temporary:
            digest = sha256_of(temporary)
            if not digest.startswith(sha256) or _fits(temporary, etag) is False:
                raise HubError(
                    f"it was downloaded, but its SHA-256 is {digest}, not {sha256 or f'what its ETag {etag} says'}: "
                    "truncated, or another file than the one this release was made with. It has been removed; try "
                    "again, or update qzoo"
                )
            if not _is(blob, etag):  # another process may have been faster, and read it by now
                os.replace(temporary, blob)
    if not place.exists() or not place.samefile(blob):
        _link(place, blob)
    if (revision or "main") != commit:
        reference = storage / "refs" / (revision or "main")
        reference.parent.mkdir(parents=True, exist_ok=True)
        write_text(reference, commit)
    return place


def _link(place: Path, blob: Path) -> None:
    """The cache's name for a content: a link, or where the system has none, the file itself."""
    place.parent.mkdir(parents=True, exist_ok=True)
    temporary = place.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        temporary.symlink_to(os.path.relpath(blob, place.parent))
        os.replace(temporary, place)
    except OSError:
        temporary.unlink(missing_ok=True)
        os.replace(blob, place)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.hostname, parts.port


def _fits(path: Path, etag: str) -> bool | None:
    """Whether an ETag of the Hub is this file's hash: SHA-256 of large files, git's SHA-1 of small ones."""
    if re.fullmatch("[0-9a-f]{64}", etag):
        return sha256_of(path) == etag
    if re.fullmatch("[0-9a-f]{40}", etag):
        as_git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        # A mirror of another kind may give the SHA-1 of the content alone.
        return etag in (digest_of(path, as_git), digest_of(path, hashlib.sha1(usedforsecurity=False)))
    return None


def _is(blob: Path, etag: str) -> bool:
    return blob.is_file() and _fits(blob, etag) is True
