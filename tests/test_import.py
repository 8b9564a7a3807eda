"""Importing the package is cheap, and its names are what they say whatever was imported before."""

from __future__ import annotations

import ast
import inspect
import pkgutil
import pydoc
import subprocess
import sys
from pathlib import Path

import pytest

import qzoo

HEAVY = (
    "torch",
    "torchvision",
    "timm",
    "onnx",
    "onnxruntime",
    "matplotlib",
    "huggingface_hub",
    "rich",
    "PIL",
)


def run(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return result.stdout.strip()


def loaded_after(statement: str, names: tuple[str, ...]) -> set[str]:
    code = f"import sys\n{statement}\nprint(*[n for n in {names!r} if n in sys.modules])"
    return set(run(code).split())


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert loaded_after("import qzoo", HEAVY) == set()


def test_building_a_model_needs_torch_alone() -> None:
    heavy = (*(name for name in HEAVY if name != "torch"), "torch._dynamo", "sympy")
    assert loaded_after("import qzoo; qzoo.resnet20(quantize=True)", heavy) == set()
    families = """
import qzoo
from qzoo.registry import architecture
from qzoo.zoo.checkpoint import empty_model
from qzoo.zoo.request import new_config
for name in {architecture(name).build.__module__: name for name in qzoo.list_models()}.values():
    empty_model(new_config(name), None)
"""
    assert loaded_after(families, ("torch._dynamo",)) == set(), "arithmetic on tensors without memory"


def test_help_imports_nothing_heavy() -> None:
    code = f"""
from qzoo.__main__ import COMMANDS, main
for arguments in ("--version", "--help", *(f"{{name}} --help" for name in COMMANDS)):
    try: main(arguments.split())
    except SystemExit: pass
print("loaded:", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    assert run("import sys" + code).rpartition("loaded:")[2].split() == []


def test_quant_is_found_without_an_import_of_its_own() -> None:
    assert run("import qzoo; print(qzoo.quant.TensorQuantizer.__name__)") == "TensorQuantizer"


def test_no_module_has_the_name_of_a_public_function() -> None:
    # Importing a submodule binds it to its package, so it would take the function's place.
    modules = {module.name for module in pkgutil.iter_modules(qzoo.__path__)}
    assert not modules & {*qzoo.__all__, *qzoo.list_models()}


def test_every_public_name_and_architecture_resolves() -> None:
    listed = dir(qzoo)
    for name in (*qzoo.__all__, *qzoo.list_models()):
        assert name in listed
        assert getattr(qzoo, name) is getattr(qzoo, name)  # resolved once
    assert qzoo.resnet50.__name__ == "resnet50"
    assert "ResNet-50" in qzoo.resnet50.__doc__


def test_dir_shows_the_api_only() -> None:
    submodules = {
        "config",
        "data",
        "distributed",
        "export",
        "models",
        "ptq",
        "qat",
        "quant",
        "registry",
        "runtimes",
    }
    assert set(dir(qzoo)) == {*qzoo.__all__, *qzoo.list_models(), *submodules}


def test_help_of_an_architecture_shows_the_arguments_of_create_model() -> None:
    shown, full = inspect.signature(qzoo.resnet50), inspect.signature(qzoo.create_model)
    assert list(shown.parameters.values()) == list(full.parameters.values())[1:]
    text = pydoc.render_doc(qzoo.resnet50, renderer=pydoc.plaintext)
    assert "quantize: 'bool | str | Scheme | None' = None" in text
    for name in shown.parameters:
        assert f"    {name}: " in text.partition("Args:")[2]
    assert "Raises:" in text


def test_unknown_names_are_attribute_errors_that_suggest() -> None:
    with pytest.raises(AttributeError, match=r"did you mean.*'resnet50'"):
        _ = qzoo.resnet5
    assert not hasattr(qzoo, "_private")


def test_version_is_that_of_the_installed_package() -> None:
    from importlib import metadata

    try:
        installed = metadata.version("qzoo")
    except metadata.PackageNotFoundError:
        pytest.skip("qzoo is not installed, only on the path")
    assert installed == qzoo.__version__


def test_refused_arguments_are_argument_errors_and_no_plain_value_errors() -> None:
    """The commands print a QzooError as one line, and anything else with its traceback."""
    plain = [
        f"{path}:{node.lineno}"
        for folder in (Path(qzoo.__file__).parent, Path(qzoo.models.__file__).parent)  # in a checkout a link
        for path in folder.rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Raise)
        and isinstance(node.exc, ast.Call)
        and isinstance(node.exc.func, ast.Name)
        and node.exc.func.id == "ValueError"
    ]
    assert not plain, "raise qzoo.errors.ArgumentError, which is a ValueError, in these places"
