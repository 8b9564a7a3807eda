"""Every public name has a docstring with an example, and the examples run.

An example may use, without making them, ``qzoo``, ``torch``, the public names of its module, and what the package's
docstring promises: a ``model``, its ``images``, a ``loader``, and the files ``photo.jpg`` and ``model.onnx``.
"""

from __future__ import annotations

import contextlib
import doctest
import importlib
import inspect
import io
import re
import shutil
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import qzoo
from qzoo import registry

MODULES = (
    "qzoo",
    "qzoo.models.layers",
    "qzoo.quantizers",
    "qzoo.accuracy",
    "qzoo.scheme",
    "qzoo.registry",
    "qzoo.config",
    "qzoo.distributed",
    "qzoo.runtimes",
    "qzoo.export",
    "qzoo.ptq",
    "qzoo.data",
    "qzoo.qat",
    "qzoo.quant",
    "qzoo.quant.nn",
    "qzoo.quant.nn.functional",
    "qzoo.quant.calib",
    "qzoo.quant.tensor_quant",
    "qzoo.quant.quant_modules",
    "qzoo.quant.optim.helper",
    "qzoo.quant.utils",
    "qzoo.quant.cuda_ext",
)
OTHERS = (
    "qzoo.zoo.project.write_project",
    "qzoo.runtimes.pytorch.run",
    "qzoo.runtimes.pytorch.output_of",
    "qzoo.runtimes.pytorch.logits_of",
    "qzoo.data.files.broken_images",
)
FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
CHECKPOINT = "resnet20.fmnist-w8a8"


def names_of(module: types.ModuleType) -> list[str]:
    """The public names of a module: its ``__all__``, or what it defines."""
    listed = getattr(module, "__all__", None)
    if listed is not None:
        return list(listed)
    own = module.__name__ if hasattr(module, "__file__") and not hasattr(module, "__path__") else ""
    return [
        name
        for name, value in vars(module).items()
        if not name.startswith("_")
        and callable(value)
        and (value.__module__ == own if own else value.__module__.startswith(module.__name__ + "."))
    ]


def documented() -> dict[str, Any]:
    """Public functions and classes by the first name that they are known under; constants and modules are left out."""
    found: dict[int, tuple[str, Any]] = {}
    for path in MODULES:
        module = importlib.import_module(path)
        for name in names_of(module):
            value = getattr(module, name)
            if inspect.isclass(value) or (callable(value) and inspect.getdoc(value)):
                found.setdefault(id(value), (f"{path}.{name}", value))
    for path in OTHERS:
        module_name, _, name = path.rpartition(".")
        value = getattr(importlib.import_module(module_name), name)
        found.setdefault(id(value), (path, value))
    return dict(found.values())


DOCUMENTED = documented()


def docstring(value: Any) -> str:
    """The docstring of the object itself; a class does not borrow its base's."""
    return inspect.cleandoc(value.__doc__ or "")


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return qzoo.export_onnx(
        qzoo.create_model(CHECKPOINT, True), tmp_path_factory.mktemp("onnx") / "model.onnx"
    )


@pytest.fixture(scope="session")
def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    preprocessing = qzoo.create_model(CHECKPOINT, True).qzoo_config.preprocessing
    return list(qzoo.data.load_data(preprocessing, "fashion-mnist", subset=":16", batch_size=8))


def test_first_line_is_a_sentence_that_one_would_search_for() -> None:
    """Functions say what they do, "Export a model ...", classes what they are: no signature, no "The ..."."""
    wrong = []
    for name, value in DOCUMENTED.items():
        first = docstring(value).partition("\n")[0]
        weak = not inspect.isclass(value) and first.startswith(("The ", "A ", "An ", "Whether ", "What "))
        if not first[:1].isupper() or not first.endswith(".") or weak:
            wrong.append(f"{name}: {first}")
    assert not wrong, "\n".join(wrong)


def section(text: str, name: str) -> str:
    """A section of a docstring, such as "Args"; empty where there is none."""
    return text.partition(f"\n{name}:\n")[2].partition("\n\n")[0]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_arguments_and_results_are_documented(name: str) -> None:
    value = DOCUMENTED[name]
    text = docstring(value)
    arguments = section(text, "Args")
    if inspect.isclass(value):
        plain = name in ("qzoo.HubMixin", "qzoo.data.Loader")  # made without arguments
        assert plain or arguments or section(text, "Attributes"), f"{name}: neither Args nor Attributes"
        return
    signature = inspect.signature(value)
    missing = [other for other in signature.parameters if not re.search(rf"\b{other}\b", arguments)]
    assert not missing, f"{name}: not in Args: {', '.join(missing)}"
    if signature.return_annotation not in ("None", "Iterator[None]"):
        assert section(text, "Returns"), f"{name}: no Returns"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_has_an_example(name: str) -> None:
    assert ">>> " in docstring(DOCUMENTED[name]), f"{name} has no example"


@pytest.mark.parametrize("name", DOCUMENTED)
def test_example_runs(
    name: str, batches: Any, request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    value = DOCUMENTED[name]
    text = docstring(value)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(registry, "_entries", dict(registry._entries))  # an example registers a network
    if '"photo.jpg"' in text:
        Image.new("RGB", (40, 30), "teal").save("photo.jpg")
    if '"model.onnx"' in text:
        shutil.copy(request.getfixturevalue("exported"), tmp_path)
    module = importlib.import_module(name.rpartition(".")[0])
    names = {} if module is qzoo else {other: getattr(module, other) for other in names_of(module)}
    names |= {"qzoo": qzoo, "torch": torch, "images": batches[0][0], "loader": batches}
    if "model" in text:
        names["model"] = qzoo.create_model(CHECKPOINT, True)
    test = doctest.DocTestParser().get_doctest(text, names, name, None, None)
    said = io.StringIO()
    torch.manual_seed(0)
    with contextlib.redirect_stderr(io.StringIO()):
        doctest.DocTestRunner(optionflags=FLAGS).run(test, out=said.write)
    if said.getvalue():
        pytest.fail(said.getvalue(), pytrace=False)
