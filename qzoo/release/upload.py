"""Folders to the Hub in one commit; and ``push_to_hub``, for models that are no release of the zoo."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from qzoo.cards.card import write_card
from qzoo.cards.eval_results import write_eval_results
from qzoo.config import config_of
from qzoo.errors import HubError
from qzoo.files import temporary_folder
from qzoo.version import __version__
from qzoo.zoo import hub
from qzoo.zoo.checkpoint import save_pretrained
from qzoo.zoo.downloads import check_token


def push_to_hub(
    model: nn.Module,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool = False,
    revision: str = "main",
    token: str | None = None,
) -> str:
    """Push a model to the Hugging Face Hub: weights, ``config.json`` and card, in one commit.

    :func:`qzoo.publish` is for releases: it takes a folder with measured figures, adds ONNX files, tags and pins.

    Args:
        model: float, or quantized with a range in every quantizer.
        repo_id: ``"org/name"``; created if it is not there.
        commit_message: what the commit says.
        private: of a repository that is created.
        revision: branch to commit to.
        token: by default the one of ``hf auth login`` or ``HF_TOKEN``.

    Returns:
        The commit's address.

    Raises:
        CheckpointError: the model can't be saved.
        HubError: the upload failed; called again, it does not send what the Hub has already.

    Example:
        >>> address = qzoo.push_to_hub(model, "org/my-resnet20")  # doctest: +SKIP
    """
    hub.check_repository(repo_id)
    check_token(token)
    with temporary_folder() as scratch:
        folder = save_pretrained(model, scratch / "checkpoint")
        write_card(folder, repo_id)
        write_eval_results(folder)
        message = commit_message or f"{config_of(model).name}, qzoo {__version__}"
        try:
            return upload(folder, repo_id, message, private, revision, token)[1]
        except Exception as error:
            reason = hub.explain(error)
    # Not in the except clause: see qzoo.zoo.hub.fetch.
    raise HubError(f"the model was not pushed to {repo_id}: {reason}")


def upload(
    folder: Path, repo: str, message: str, private: bool, revision: str, token: str | None = None
) -> tuple[str, str]:
    """Upload all files of a folder in one commit; returns the commit and its address. Raises what the client raises."""
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(library_name="qzoo", library_version=__version__, token=token)
    api.create_repo(repo, private=private, exist_ok=True)
    if revision != "main":
        api.create_branch(repo, branch=revision, exist_ok=True)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    operations = [
        CommitOperationAdd(path_in_repo=path.relative_to(folder).as_posix(), path_or_fileobj=path)
        for path in files
    ]
    commit = api.create_commit(repo, operations, commit_message=message, revision=revision)
    return commit.oid, commit.commit_url


def tag_commit(repo: str, tag: str, commit: str) -> None:
    """Tag a commit; a tag of the same name moves to it. Raises what the client raises."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    api = HfApi(library_name="qzoo", library_version=__version__)
    try:
        api.create_tag(repo, tag=tag, revision=commit)
    except HfHubHTTPError as error:
        if getattr(error.response, "status_code", 0) != 409:
            raise
        # The same version was published before: the tag follows.
        api.delete_tag(repo, tag=tag)
        api.create_tag(repo, tag=tag, revision=commit)
