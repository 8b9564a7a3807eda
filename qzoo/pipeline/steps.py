"""Steps of a long job: a finished one whose inputs are the same is not repeated when the job is started again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path
from typing import Any

import torch

from qzoo.distributed import Group
from qzoo.errors import QzooError
from qzoo.files import remove_scratch, write_text
from qzoo.version import __version__
from qzoo.zoo import hub

STATE = "steps.json"


class Steps:
    """Finished steps with their inputs, results and files, in ``<folder>/steps.json``.

    Args:
        folder: where the steps' files are, too, and which no other process writes to meanwhile (the caller holds
            :func:`qzoo.files.exclusive`); None remembers nothing.
        report: gets a line for each step.
        again: forget what was finished.
        group: the processes that take the steps together; rank 0 remembers them.

    Raises:
        QzooError: the folder's ``steps.json`` can't be read.
    """

    def __init__(
        self,
        folder: Path | None = None,
        report: Callable[[str], None] | None = None,
        again: bool = False,
        group: Group | None = None,
    ) -> None:
        self.folder, self.group = folder, group or Group()
        self._report = report or (lambda text: None)
        self._done: dict[str, Any] = {}
        if folder is not None and self.group.first:
            self._done = {} if again else _read(folder / STATE)
            remove_scratch(folder)

    def run(
        self, name: str, inputs: dict[str, Any], action: Callable[[], Any], files: Iterable[str] = ()
    ) -> Any:
        """Give the step's result, from ``action`` or from last time; in every process that of rank 0.

        Args:
            inputs: all that the result depends on, as JSON values. qzoo's code and torch's version are added.
            action: returns what JSON has; called where the inputs are others, or a file is not what it was.
            files: paths in the folder that the action writes, in rank 0.
        """
        inputs = json.loads(json.dumps({**inputs, "code": code_digest(), "torch": torch.__version__}))
        old = self._done.get(name)
        done = old is not None and old["inputs"] == inputs and self._whole(old["files"])
        if self.group.broadcast(done):
            self._report(f"{name}: done before")
            return self.group.broadcast(old and old["result"])
        self._report(name)
        result = json.loads(json.dumps(action(), allow_nan=False))
        if self.folder is not None and self.group.first:
            hashes = {file: hub.sha256_of(self.folder / file) for file in files}
            self._done[name] = {"inputs": inputs, "result": result, "files": hashes}
            write_text(self.folder / STATE, json.dumps(self._done, indent=1) + "\n")
        return self.group.broadcast(result)

    def _whole(self, files: dict[str, str]) -> bool:
        if self.folder is None:
            return False
        paths = {self.folder / file: digest for file, digest in files.items()}
        return all(path.is_file() and hub.sha256_of(path) == digest for path, digest in paths.items())


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        steps = json.loads(path.read_text(encoding="utf-8"))
        if all({"inputs", "result", "files"} <= step.keys() for step in steps.values()):
            return dict(steps)
    except (OSError, ValueError, AttributeError) as error:
        raise QzooError(
            f"{path} can't be read ({error}); remove it, and the steps are done once more"
        ) from error
    raise QzooError(f"{path} is no record of steps; remove it, and the steps are done once more")


@cache
def code_digest() -> str:
    """Compute a digest of this package's code: a step done by other code is done again."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    files = [
        *root.rglob("*.py"),
        *(root / "models").glob("*.py"),
    ]  # rglob does not follow the link of a checkout
    for path in sorted(set(files)):
        digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    return f"{__version__} {digest.hexdigest()}"
