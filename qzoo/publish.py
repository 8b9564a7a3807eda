"""``publish``: a checkpoint folder becomes a Hub repository, in one commit that is checked and pinned."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

from qzoo import hub
from qzoo.cards import write_card
from qzoo.checkpoint import load_pretrained
from qzoo.config import WEIGHTS, Config, read_config
from qzoo.errors import HubError
from qzoo.eval_results import PATH as EVAL_RESULTS
from qzoo.eval_results import eval_results
from qzoo.export.onnx import export_onnx


@dataclass(frozen=True)
class Published:
    """What was uploaded, or in a dry run would have been.

    Attributes:
        repo: the repository's name.
        commit: of the upload; "" in a dry run.
        tag: the name that the commit was given.
        files: bytes of each file, by path.
    """

    repo: str
    commit: str
    tag: str
    files: dict[str, int]


def publish(
    folder: str | Path,
    repo: str | None = None,
    *,
    private: bool = False,
    revision: str = "main",
    dry_run: bool = False,
    pin: bool = True,
) -> Published:
    """Upload a checkpoint with its ONNX files and card; the folder itself stays as it is.

    After a broken upload the same call goes on: what the Hub has already is not sent again. The commit is
    downloaded once more and loaded before it counts as published.

    Args:
        folder: a checkpoint with measured figures.
        repo: ``"org/name"``; by default the checkpoint's name in the organisation ``QZOO_HUB_ORG``, "qzoo" if
            that is not set.
        private: of a repository that is created.
        revision: branch to commit to.
        dry_run: do everything but talk to the Hub.
        pin: write commit and SHA-256 to the package's ``hub_pins.json``.

    Raises:
        CheckpointError: the folder does not load.
        HubError: it has no figures, or the upload failed.
        ExportError, MissingDependencyError: the ONNX files can't be written.
    """
    folder = Path(folder)
    config = read_config(folder)
    if not config.metrics:
        raise HubError(f"{config.name} has no measured figures; `qzoo build {config.name}` measures")
    repo = repo or f"{os.environ.get('QZOO_HUB_ORG', 'qzoo')}/{config.name}"
    if "/" not in repo:
        raise HubError(f"{repo!r} is no repository; expected org/name")
    with tempfile.TemporaryDirectory(prefix="qzoo-publish-") as scratch:
        staged = _stage(folder, config, Path(scratch))
        files = {p.relative_to(staged).as_posix(): p.stat().st_size for p in staged.rglob("*") if p.is_file()}
        tag = f"v{config.qzoo_version}"
        if dry_run:
            return Published(repo, "", tag, files)
        try:
            commit = _upload(staged, sorted(files), repo, config, tag, private, revision)
        except Exception as error:
            raise HubError(f"{config.name} was not published to {repo}: {hub.explain(error)}") from None
        digest = hub.sha256_of(staged / "config.json")
    load_pretrained(hub.download(repo, commit, name=config.name, sha256=digest))
    if pin:
        write_pin(config.name, hub.Pin(repo, commit, digest))
    return Published(repo, commit, tag, files)


def _stage(folder: Path, config: Config, staged: Path) -> Path:
    """A copy of the checkpoint with ONNX files, their hashes in config.json, and a fresh card."""
    model = load_pretrained(folder)
    shutil.copy2(folder / WEIGHTS, staged / WEIGHTS)
    if config.scheme is None:
        targets = {"onnx/model.onnx": "onnxruntime"}
    else:
        targets = {"onnx/model_int8.onnx": "onnxruntime", "onnx/model_int8_tensorrt.onnx": "tensorrt"}
    (staged / "onnx").mkdir()
    for name, target in targets.items():
        export_onnx(model, staged / name, target=target)
    names = (WEIGHTS, *targets)
    config = dataclasses.replace(
        config,
        files={name: hub.sha256_of(staged / name) for name in names},
        sizes={name: (staged / name).stat().st_size for name in names},
    )
    (staged / "config.json").write_text(config.to_json(), encoding="utf-8")
    write_card(staged)
    if results := eval_results(config):
        (staged / EVAL_RESULTS).parent.mkdir()
        (staged / EVAL_RESULTS).write_text(results, encoding="utf-8")
    return staged


def _upload(
    staged: Path, files: list[str], repo: str, config: Config, tag: str, private: bool, revision: str
) -> str:
    """One commit with all files, tagged; returns it."""
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="qzoo", library_version=config.qzoo_version)
    api.create_repo(repo, private=private, exist_ok=True)
    operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=staged / name) for name in files]
    message = f"{config.name}, qzoo {config.qzoo_version}"
    commit = api.create_commit(repo, operations, commit_message=message, revision=revision).oid
    try:
        api.create_tag(repo, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", 0) != 409:
            raise
        # The same version was published before: the tag follows.
        api.delete_tag(repo, tag=tag)
        api.create_tag(repo, tag=tag, revision=commit)
    return commit


def write_pin(name: str, pin: hub.Pin) -> None:
    """Record where a checkpoint is, in the package's own list."""
    pins = {**hub.pins(), name: pin}
    text = json.dumps({key: dataclasses.asdict(pins[key]) for key in sorted(pins)}, indent=2) + "\n"
    temporary = hub.PINS.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, hub.PINS)
    hub.pins.cache_clear()
