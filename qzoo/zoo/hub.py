"""Find checkpoints: in the user's store, in the package, at a pin on the Hugging Face Hub, or in any Hub repository.

Downloads go through ``huggingface_hub``, so its cache and its variables (``HF_HOME``, ``HF_ENDPOINT``,
``HF_TOKEN``, ``HF_HUB_OFFLINE``) are honoured. A file whose SHA-256 differs from the expected one is taken
out of the cache and never opened.
"""

from __future__ import annotations

import difflib
import errno
import os
import re
import socket
import urllib.parse
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qzoo.config import MAX_BYTES, WEIGHTS, read_config
from qzoo.errors import ArgumentError, CheckpointError, HubError, UnknownModelError
from qzoo.files import sha256_of
from qzoo.registry import (
    Pin,
    architecture,
    is_name,
    list_architectures,
    natural_key,
    parse_name,
    suggest,
)
from qzoo.zoo.downloads import LARGEST, cached_file, check_token, download_into_cache, fits_its_name
from qzoo.zoo.store import stored

_LONGEST = 1024  # characters of a folder or a name
EMBEDDED = Path(__file__).parents[1] / "model_cards"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_ADDRESS = re.compile(r"(?:hf-hub:|hf:|hf://|https://[\w.-]+/)([\w.-]+/[\w.-]+)/?", re.ASCII)
_REVISION = re.compile(r"(?!.*\.\.)\w[\w./-]*", re.ASCII)


@dataclass(frozen=True)
class Access:
    """Settings of access to the Hub; by default huggingface_hub's variables and login.

    Attributes:
        cache_dir: folder of the cache.
        token: of a private or gated repository; False sends none.
        local_files_only: take what is in the cache, without a request.
    """

    cache_dir: str | Path | None = None
    token: str | bool | None = field(default=None, repr=False)
    local_files_only: bool = False

    def __post_init__(self) -> None:
        check_token(self.token)


USUAL = Access()


def pins() -> Mapping[str, Pin]:
    """List the checkpoints on the Hub that architectures pin (``register_model(published=...)``), by name."""
    entries = map(architecture, list_architectures())
    return {name: pin for entry in entries for name, pin in entry.published.items()}


def embedded() -> dict[str, Path]:
    """List the folders of the checkpoints in the package: those with weights (a recipe alone is none)."""
    folders = sorted(EMBEDDED.glob("*/config.json")) if EMBEDDED.is_dir() else []
    return {path.parent.name: path.parent for path in folders if (path.parent / WEIGHTS).is_file()}


def checkpoints() -> list[str]:
    """List all checkpoints that can be loaded: in the user's store, embedded, or pinned on the Hub."""
    return sorted({*stored(), *embedded(), *pins()}, key=natural_key)


def local_folders(name: str) -> list[Path]:
    """List the local folders of a checkpoint's name, by precedence: the user's own, the package's."""
    return [folders[name] for folders in (stored(), embedded()) if name in folders]


def place_of(name: str) -> str:
    """Describe where the checkpoint ``name`` lies: a folder of the user's, the package, or a repository."""
    if name in stored():
        return str(stored()[name])
    return "in the package" if name in embedded() else f"{pins()[name].repo} on the Hub"


def named(name: str, access: Access = USUAL) -> Path:
    """Find the folder of the checkpoint ``name``, one of :func:`checkpoints`; download it if need be.

    Raises:
        UnknownModelError: no checkpoint of that name; says which exist and how to build one.
        CheckpointError: the user's store has another checkpoint under that name.
        HubError: the download failed.
    """
    if (own := stored().get(name)) is not None:
        if (other := read_config(own).name) != name:
            raise CheckpointError(f"{own} holds {other}; a folder of the store has its checkpoint's name")
        return own
    if (folder := embedded().get(name)) is not None:
        return folder
    if name not in pins():
        raise UnknownModelError(missing_checkpoint(name))
    return download_pin(name, access)


def locate(where: str | Path, revision: str | None = None, access: Access = USUAL) -> Path:
    """Find the folder of a checkpoint; download it if need be.

    Args:
        where: a folder; the name of a checkpoint, such as ``"resnet20.fmnist-w8a8"``; or a repository on the Hub,
            ``"org/name"``. A checkpoint folder here wins over a checkpoint of the same name elsewhere.
        revision: commit, branch or tag of a repository; not for folders and names, which are what they are.
        access: cache and token.

    Raises:
        UnknownModelError: no folder and no checkpoint of that name; says which exist and how to build one.
        HubError: the download failed.
    """
    path, text = Path(where), str(where)
    if not text:
        raise CheckpointError("an empty text is no folder and no name; '.' is the current folder")
    if len(text) > _LONGEST:
        raise CheckpointError(f"{text[:40]!r}... is no folder and no name: it has {len(text)} characters")
    may_be_name = isinstance(where, str) and "/" not in text and os.sep not in text
    is_folder = os.path.isfile(path / "config.json")
    if may_be_name and not is_folder and is_name(text):
        text = str(parse_name(text))  # under the zoo's name of its architecture
    if may_be_name and not is_folder and (local_folders(text) or text in pins()):
        if revision is not None:
            raise ArgumentError(
                f"{text!r} is a checkpoint's name, which has no revisions; give a Hub repository to choose one"
            )
        return named(text, access)
    if os.path.isdir(path):  # False for names that no file system takes, where Path.is_dir raises OSError
        return path
    if os.path.isfile(path):
        raise CheckpointError(
            f"{text!r} is a file; give the folder of a checkpoint, or load a state dict that pytorch-quantization "
            "calibrated with qzoo.load_calibrated(model, file)"
        )
    if isinstance(where, str) and _REPOSITORY.fullmatch(text):
        return _repository(path, text, revision, access)
    if may_be_name:
        raise UnknownModelError(missing_checkpoint(text))
    address = _ADDRESS.fullmatch(text)
    hint = f"; did you mean {address[1]!r}?" if address else _near(path)
    raise CheckpointError(
        f"{text!r} is no folder, no checkpoint's name and no Hub repository (org/name){hint}"
    )


def _repository(path: Path, text: str, revision: str | None, access: Access) -> Path:
    """The folder of a repository; where it can't be had, the text may have been meant as a path."""
    try:
        return download(text, revision, access=access)
    except HubError as error:
        raise HubError(f"there is no folder {text!r}; as a Hub repository: {error}{_near(path)}") from error


def _near(path: Path) -> str:
    """Text to append to an error: folders beside ``path`` whose names are near to its own."""
    try:
        folders = [p.name for p in path.parent.iterdir() if p.is_dir()]
    except OSError:  # no such folder, or not ours to read
        return ""
    near = difflib.get_close_matches(path.name, folders, n=3, cutoff=0.6)
    return f"; did you mean {', '.join(repr(str(path.parent / name)) for name in near)}?" if near else ""


def missing_checkpoint(name: str) -> str:
    """Write the error for a missing checkpoint: which ones there are, and how to build it."""
    known = checkpoints()
    parsed = parse_name(name)
    architectures = list_architectures()
    if parsed.arch not in architectures:
        near = suggest(name, [*known, *architectures])
        return f"no checkpoint and no architecture {name!r}{near}; `qzoo list` and `qzoo list --pretrained` list them"
    same = [other for other in known if other.partition(".")[0] == parsed.arch]
    what = (
        f"those of {parsed.arch}: {', '.join(same)}" if same else f"none of {parsed.arch} has been built yet"
    )
    text = f"no checkpoint {name!r}{suggest(name, same)} ({what}); "
    if parsed.scheme is None:
        return f"{text}`qzoo train {name}` makes one"
    by_hand = ', or calibrate what pretrained="float" gives' if architecture(parsed.arch).weights else ""
    return f"{text}`qzoo build {name} --data DIR` makes one{by_hand}"


def download(
    repo: str,
    revision: str | None = None,
    *,
    name: str | None = None,
    sha256: str | None = None,
    access: Access = USUAL,
) -> Path:
    """Fetch config.json and weights of a checkpoint repository into the Hub cache; returns the folder there.

    Args:
        revision: commit, branch or tag; the default branch if None.
        name: the checkpoint that must be in it.
        sha256: of its config.json.
        access: cache and token.

    Raises:
        HubError: no network, no such repository, file or revision, gated, disk full, or content that differs
            from its SHA-256 (taken out of the cache).
        CheckpointError: the config is not valid, or of another checkpoint.
    """
    config_file = fetch(repo, "config.json", revision, sha256 or "", access, MAX_BYTES)
    folder, commit = config_file.parent, config_file.parent.name
    try:
        config = read_config(folder)
    except CheckpointError as error:
        if (
            fits_its_name(config_file) is None
        ):  # it may have been damaged in the cache: the next call asks anew
            discard(config_file)
        raise CheckpointError(f"{error} (from {repo})") from error
    if name is not None and config.name != name:
        raise CheckpointError(f"{repo} at {commit} holds {config.name!r}, not {name!r}")
    if WEIGHTS not in config.files:
        raise CheckpointError(
            f"{repo} at {commit}: config.json lists no {WEIGHTS}; it is a recipe without weights"
        )
    fetch(
        repo, WEIGHTS, commit, config.files[WEIGHTS], access, min(config.sizes.get(WEIGHTS, LARGEST), LARGEST)
    )
    return folder


def download_pin(name: str, access: Access = USUAL) -> Path:
    """Download a pinned checkpoint: config.json and weights, checked. Raises as :func:`download`."""
    pin = pins()[name]
    return download(pin.repo, pin.revision, name=name, sha256=pin.sha256, access=access)


def fetch(
    repo: str,
    file: str,
    revision: str | None = None,
    sha256: str = "",
    access: Access = USUAL,
    limit: int = LARGEST,
) -> Path:
    """Fetch one file of a Hub repository, from the cache or by a download.

    Args:
        sha256: expected SHA-256 or a prefix; "" takes any content.
        limit: the most bytes that it may have.

    Raises:
        HubError: see :func:`download`.
    """
    if revision is not None and not _REVISION.fullmatch(revision):
        raise HubError(f"{revision!r} is no revision; expected a commit, a branch or a tag of {repo}")
    place = f"{repo}{f' at {revision}' if revision else ''}"
    try:
        return _fetch(repo, file, revision, sha256, access, limit)
    except Exception as error:
        reason = explain(error)
    # Not in the except clause: the client's error may quote a token, and a traceback prints what an error came from.
    raise HubError(f"{file} of {place} can't be had from the Hub: {reason}")


def _fetch(repo: str, file: str, revision: str | None, sha256: str, access: Access, limit: int) -> Path:
    from huggingface_hub import constants, errors

    cached = cached_file(repo, file, revision, access.cache_dir)
    offline = constants.HF_HUB_OFFLINE or access.local_files_only
    if cached is not None and not _is_whole(cached, sha256):
        discard(cached)
        if offline:
            raise HubError("it was damaged in the cache and has been removed; go online and try again")
        cached = None
    if cached is None and offline:
        raise HubError(
            "it is not in the cache, and the Hub must not be asked (HF_HUB_OFFLINE, local_files_only)"
        )
    if cached is not None and (offline or re.fullmatch("[0-9a-f]{40}", revision or "")):
        return cached
    if cached is None:
        _check_network(constants.ENDPOINT)
    try:
        return download_into_cache(
            repo, file, revision, sha256, limit=limit, cache_dir=access.cache_dir, token=access.token
        )
    except (HubError, errors.RevisionNotFoundError, errors.EntryNotFoundError):
        raise
    except Exception:
        if cached is None:
            raise
        return cached  # the Hub can't be reached, or doesn't answer: what the branch was when it last did


def _is_whole(path: Path, sha256: str) -> bool:
    """Whether a file of the cache is what it was: its SHA-256, or where that is not known, its blob's name."""
    return sha256_of(path).startswith(sha256) if sha256 else fits_its_name(path) is not False


def check_repository(text: str) -> None:
    """Check the name of a repository. Raises HubError."""
    if not _REPOSITORY.fullmatch(text):
        raise HubError(f"{text!r} is no repository; expected org/name")


def _check_network(endpoint: str) -> None:
    """Fail at once where the endpoint's name does not resolve; the client would try for half a minute."""
    if not urllib.request.getproxies():
        socket.getaddrinfo(urllib.parse.urlsplit(endpoint).hostname, None)


def explain(error: BaseException) -> str:
    """Explain a download's or upload's failure, and what to do. Never contains a token."""
    from huggingface_hub import errors

    if isinstance(error, HubError):
        return str(error)

    chain: list[BaseException] = []
    link: BaseException | None = error
    while link is not None and link not in chain:
        chain.append(link)
        link = link.__cause__ or link.__context__
    if any(isinstance(e, OSError) and e.errno in (errno.ENOSPC, errno.EDQUOT) for e in chain):
        return "the disk is full; free some space, or let HF_HOME name a folder on another disk"
    if isinstance(error, errors.GatedRepoError):
        return (
            "the repository is gated; accept its terms on its page and log in (`hf auth login` or HF_TOKEN)"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            "no such repository, or a private one; check the name, and log in (`hf auth login` or HF_TOKEN)"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return "the repository has no such revision"
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        return "the Hub can't be reached; check the network (or it must not be asked: HF_HUB_OFFLINE)"
    if isinstance(error, errors.EntryNotFoundError):
        return "the repository has no such file"
    if isinstance(error, socket.gaierror):
        return "no network (the Hub's address does not resolve); connect, or set HF_ENDPOINT to a mirror"
    if isinstance(error, errors.HfHubHTTPError):
        status = getattr(error.response, "status_code", "no status")
        if status in (401, 403):
            return f"the server answered {status}; log in (`hf auth login` or HF_TOKEN) as someone who may read it"
        return f"the server answered {status}; try again later"
    return f"{type(error).__name__}: {redact(str(error))}; try again"


def redact(text: str) -> str:
    """Remove what looks like an access token, or a password in an address, from a text."""
    from huggingface_hub import get_token

    for part in (get_token() or "").split():  # of any form
        text = text.replace(part, "[token]") if len(part) > 3 else text
    return re.sub(r"hf_\w{4,}|(?i:bearer)\s+\S+|(?<=://)[^/@\s]+(?=@)", "[token]", text)


# ---- integrity ----


def verify_file(path: Path, sha256: str, name: str = "") -> None:
    """Remove a downloaded file whose SHA-256 does not start with the expected digits.

    Args:
        name: of the file in messages; its own by default.

    Raises:
        HubError: it does not; the file is gone.
    """
    if not sha256 or (digest := sha256_of(path)).startswith(sha256):
        return
    discard(path)
    raise HubError(
        f"{name or path.name} was downloaded, but its SHA-256 is {digest}, not {sha256}: truncated, or another file "
        "than the one this release was made with. It has been removed; try again, or update qzoo"
    )


def check_file(path: Path, sha256: str, size: int | None = None) -> None:
    """Check a file of a checkpoint folder against its config.json. Raises CheckpointError.

    Args:
        size: in bytes, where it is recorded: compared first, since a file of another size need not be hashed.
    """
    altered = f"{path} was altered or is not whole: its"
    if size is not None and (found_size := path.stat().st_size) != size:
        raise CheckpointError(f"{altered} size is {found_size} bytes, config.json says {size}")
    if (digest := sha256_of(path)) != sha256:
        raise CheckpointError(f"{altered} SHA-256 is {digest}, config.json says {sha256}")


def discard(path: Path) -> None:
    """Remove a file from a cache: in the Hub's the link and what it points to, elsewhere a user's link alone."""
    target = path.resolve()
    try:
        path.unlink(missing_ok=True)
        if target.parent.name == "blobs":
            target.unlink(missing_ok=True)
    except OSError as error:
        raise HubError(
            f"{path} is damaged and can't be removed ({error.strerror}); remove it by hand, or let HF_HOME "
            "name another folder"
        ) from None
