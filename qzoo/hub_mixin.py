"""``from_pretrained``, ``save_pretrained``, ``push_to_hub``: what users of the Hub expect of a model.

Signatures are those of huggingface_hub's ``PyTorchModelHubMixin`` where they fit. The methods call the package's
public functions by name, when they are called, so that a definition imports nothing of the Hub.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, TypeVar

import qzoo
from qzoo.errors import CheckpointError

_Model = TypeVar("_Model", bound="HubMixin")


class HubMixin:
    """Base class that gives a network ``from_pretrained``, ``save_pretrained`` and ``push_to_hub``.

    It stands beside ``nn.Module``; the registry must know the network's builder.

    Example:
        >>> folder = model.save_pretrained("my-resnet20")
        >>> model = type(model).from_pretrained("my-resnet20")
    """

    @classmethod
    def from_pretrained(
        cls: type[_Model],
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        target: str | None = None,
        revision: str | None = None,
        cache_dir: str | Path | None = None,
        token: str | bool | None = None,
        local_files_only: bool = False,
    ) -> _Model:
        """Load a checkpoint of this class, in eval mode.

        Args:
            pretrained_model_name_or_path: a folder, a zoo checkpoint's name, or a Hub repository ``"org/name"``.
            target, revision, cache_dir, token, local_files_only: of :func:`qzoo.load_pretrained`.

        Raises:
            CheckpointError: it holds another class's model; and as :func:`qzoo.load_pretrained`.
        """
        where = pretrained_model_name_or_path
        model: Any = qzoo.load_pretrained(
            where if isinstance(where, str) else Path(where),
            target=target,
            revision=revision,
            cache_dir=cache_dir,
            token=token,
            local_files_only=local_files_only,
        )
        if not isinstance(model, cls):
            raise CheckpointError(
                f"{where} holds {model.qzoo_config.architecture}, a {type(model).__name__}; "
                f"{cls.__name__}.from_pretrained loads no other class, qzoo.load_pretrained loads any"
            )
        return model

    def save_pretrained(self, save_directory: str | os.PathLike[str], *, form: str | None = None) -> Path:
        """Write a checkpoint folder; arguments, result and errors are those of :func:`qzoo.save_pretrained`."""
        return qzoo.save_pretrained(self, Path(save_directory), form=form)  # type: ignore[arg-type]

    def push_to_hub(
        self,
        repo_id: str,
        *,
        commit_message: str | None = None,
        private: bool = False,
        revision: str = "main",
        token: str | None = None,
    ) -> str:
        """Upload as a checkpoint with its card; arguments, result and errors of :func:`qzoo.push_to_hub`."""
        return qzoo.push_to_hub(
            self,  # type: ignore[arg-type]
            repo_id,
            commit_message=commit_message,
            private=private,
            revision=revision,
            token=token,
        )
