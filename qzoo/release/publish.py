"""``publish``: a checkpoint folder becomes a Hub repository, in one commit that is checked."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from qzoo.cards.card import write_card
from qzoo.cards.eval_results import write_eval_results
from qzoo.config import WEIGHTS, Config, read_config
from qzoo.errors import CheckpointError, HubError
from qzoo.export.onnx import export_onnx
from qzoo.files import temporary_folder
from qzoo.pipeline.onnx_files import onnx_name, with_files
from qzoo.release.upload import tag_commit, upload
from qzoo.zoo import hub
from qzoo.zoo.checkpoint import load_pretrained

TARGETS = ("onnxruntime", "tensorrt")


@dataclass(frozen=True)
class Publication:
    """Upload of a checkpoint to the Hub, or what it would be in a dry run.

    Attributes:
        repo: the repository's name.
        commit: of the upload; "" in a dry run.
        tag: the name that the commit was given.
        files: bytes of each file, by path.
        sha256: of config.json. With repository and commit it is the :class:`~qzoo.registry.Pin` that a model's file
            names (``register_model(published=...)``); "" in a dry run.
    """

    repo: str
    commit: str
    tag: str
    files: dict[str, int]
    sha256: str = ""


def publish(
    folder: str | Path,
    repo: str | None = None,
    *,
    private: bool = False,
    revision: str = "main",
    dry_run: bool = False,
) -> Publication:
    """Publish a checkpoint on the Hugging Face Hub, with its ONNX files and card; the folder itself stays as it is.

    After a broken upload the same call goes on: what the Hub has already is not sent again. The commit is
    downloaded once more and loaded before it counts as published.

    Args:
        folder: a checkpoint with measured figures.
        repo: ``"org/name"``; by default the checkpoint's name in the organisation ``QZOO_HUB_ORG``, "qzoo" if
            that is not set.
        private: of a repository that is created.
        revision: branch to commit to.
        dry_run: do everything but talk to the Hub.

    Returns:
        The commit, the files with their sizes, and the SHA-256 of config.json.

    Raises:
        CheckpointError: the folder does not load.
        HubError: it has no figures, the or the upload failed.
        ExportError, MissingDependencyError: the ONNX files can't be written.

    Example:
        >>> from qzoo.zoo.hub import locate
        >>> folder = locate("resnet20.fmnist-w8a8")  # or what qzoo.build returned
        >>> published = qzoo.publish(folder, "org/resnet20", dry_run=True)
    """
    config = read_config(folder)
    if not config.metrics:
        raise HubError(f"{config.name} has no measured figures; `qzoo build {config.name}` measures")
    repo = repo or f"{os.environ.get('QZOO_HUB_ORG', 'qzoo')}/{config.name}"
    hub.check_repository(repo)
    with temporary_folder() as scratch:
        staged = _stage(Path(folder), config, scratch, repo)
        files = {p.relative_to(staged).as_posix(): p.stat().st_size for p in staged.rglob("*") if p.is_file()}
        tag = f"v{config.qzoo_version}"
        if dry_run:
            return Publication(repo, "", tag, files)
        digest = hub.sha256_of(staged / "config.json")
        commit = _upload(staged, repo, config, private, revision, tag)
    load_pretrained(hub.download(repo, commit, name=config.name, sha256=digest))
    return Publication(repo, commit, tag, files, digest)


def _upload(staged: Path, repo: str, config: Config, private: bool, revision: str, tag: str) -> str:
    try:
        message = f"{config.name}, qzoo {config.qzoo_version}"
        commit, _ = upload(staged, repo, message, private, revision)
        tag_commit(repo, tag, commit)
        return commit
    except Exception as error:
        reason = hub.explain(error)
    # Not in the except clause: see qzoo.hub.fetch.
    raise HubError(f"{config.name} was not published to {repo}: {reason}")


def _stage(folder: Path, config: Config, staged: Path, repo: str) -> Path:
    """A copy of the checkpoint with its ONNX files, their hashes in config.json, and a fresh card.

    The copies are checked and loaded, not what they were made of, which may change meanwhile. An ONNX file that the
    folder has is taken as it is: it is the one that was measured.
    """
    try:
        shutil.copyfile(folder / WEIGHTS, staged / WEIGHTS)
    except OSError as error:
        raise CheckpointError(f"{folder} has no weights that can be read ({error})") from error
    (staged / "config.json").write_text(config.to_json(), encoding="utf-8")
    model = load_pretrained(staged)
    targets = TARGETS if config.scheme is not None else TARGETS[:1]
    names = {onnx_name(config, target): target for target in targets}
    (staged / "onnx").mkdir()
    for name, target in names.items():
        if name in config.files and (folder / name).is_file():
            shutil.copyfile(folder / name, staged / name)
            hub.check_file(staged / name, config.files[name], config.sizes.get(name))
        else:
            export_onnx(model, staged / name, target=target)
    config = with_files(config, staged, (WEIGHTS, *names))
    (staged / "config.json").write_text(config.to_json(), encoding="utf-8")
    write_card(staged, repo)
    write_eval_results(staged)
    return staged
