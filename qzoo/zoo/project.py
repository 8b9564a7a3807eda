"""A project of one's own: a package with one architecture, its tests and its commands, for ``qzoo new``."""

from __future__ import annotations

import importlib.util
import keyword
import re
from importlib.resources import files
from pathlib import Path
from string import Template

from qzoo.errors import ArgumentError, shown
from qzoo.files import place, scratch_beside
from qzoo.registry import PLUGINS, list_architectures

_NAME = re.compile(r"[a-z][a-z0-9_]*")

_PYPROJECT = Template(f"""\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "$package"
version = "0.1.0"
requires-python = ">=3.10"
dependencies = ["qzoo[onnx]"]

[project.optional-dependencies]
test = ["pytest>=8"]

# qzoo imports this module whenever it lists models or looks one up.
[project.entry-points."{PLUGINS}"]
$name = "$name"

[tool.setuptools]
py-modules = ["$name"]
""")

_README = Template("""\
# $name

A network for [qzoo](https://pypi.org/project/qzoo/): `$name.py` defines it, `test_$name.py` says what has to hold.

```bash
pip install -e ".[test]" && pytest   # also makes `qzoo list` find it, without --import
```

Put your layers into `$name.py`; the comments there say what only the author of a network knows. Then train it on a
folder with one subfolder of images a class, quantize it, and measure it against other tools:

```bash
qzoo train $name.own --dataset folders --data DIR
qzoo build $name.own-w8a8 --data DIR
qzoo benchmark $name.own-w8a8 --data DIR --compare quantize_static --out report
```

In Python: `qzoo.create_model("$name")`.
""")

_TEST = Template('''\
"""$name: equal to its reference, quantized where each runtime wants it, and in int8 as it was simulated."""

from __future__ import annotations

from pathlib import Path

import $name
import pytest
import qzoo
import torch
from qzoo.export.lint import coverage
from qzoo.quantizers import quantizers, quantizers_off
from torch import nn

# An independent implementation with the same parameter names, such as ``torchvision.models.resnet18()``, and the size
# of the images that both take.
REFERENCE: nn.Module | None = None
SIZE = 32
TARGETS = ("onnxruntime", "openvino", "tensorrt")


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(images: torch.Tensor) -> nn.Module:
    """With random weights, and ranges from random images."""
    torch.manual_seed(0)
    model = qzoo.create_model("$name", quantize="w8a8").eval()
    qzoo.calibrate(model, [images], progress=False)
    return model


@pytest.mark.skipif(REFERENCE is None, reason="no REFERENCE is given")
def test_outputs_equal_the_reference_bit_for_bit(images: torch.Tensor) -> None:
    plain = $name.$name(num_classes=1000).eval()
    plain.load_state_dict(REFERENCE.eval().state_dict())
    with torch.inference_mode():
        assert torch.equal(plain(images), REFERENCE(images))


def test_quantizers_add_no_parameter_and_change_nothing_when_off(images: torch.Tensor) -> None:
    plain, quantized = $name.$name().eval(), $name.$name(quantize=qzoo.Scheme()).eval()
    quantized.load_state_dict(plain.state_dict())
    with torch.inference_mode(), quantizers_off(quantized):
        assert torch.equal(quantized(images), plain(images))


def test_inputs_that_are_said_to_be_nonnegative_are(model: nn.Module, images: torch.Tensor) -> None:
    lowest: dict[str, float] = {}
    for name, quantizer in quantizers(model).items():
        if quantizer.nonnegative:
            quantizer.register_forward_pre_hook(
                lambda _, args, name=name: lowest.update({name: args[0].min().item()})
            )
    with torch.inference_mode(), quantizers_off(model):
        model(images)
    assert all(value >= 0 for value in lowest.values()), lowest


@pytest.mark.parametrize("target", TARGETS)
def test_file_has_no_findings_and_runs_in_int8(model: nn.Module, tmp_path: Path, target: str) -> None:
    path = qzoo.export_onnx(
        model, tmp_path / "model.onnx", target=target, example=torch.zeros(1, 3, SIZE, SIZE)
    )
    assert qzoo.lint(path, target) == []
    covered = coverage(path, target)
    assert covered.int8 == covered.layers
    assert covered.share == 1


def test_file_computes_what_was_simulated(
    model: nn.Module, images: torch.Tensor, tmp_path: Path
) -> None:
    path = qzoo.export_onnx(model, tmp_path / "model.onnx", example=images[:1])
    check = qzoo.export.check(path, model, images)
    assert check.sqnr_db > 30, check
''')


def write_project(name: str, parent: str | Path = ".") -> Path:
    """Write a project with one architecture: definition, test, README and package metadata.

    Its test passes at once; ``pip install -e`` in it makes the zoo find the architecture by the entry point group
    ``qzoo.models``.

    Args:
        name: of the architecture, its module and the folder, such as ``"my_net"``.
        parent: where to make the folder.

    Returns:
        The new folder.

    Raises:
        ArgumentError: a name that no module can have, or one that is taken; the folder is there already.

    Example:
        >>> folder = write_project("my_net")
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'my_net.py', 'pyproject.toml', 'test_my_net.py']
    """
    folder = Path(parent) / _checked(name)
    if folder.exists() or folder.is_symlink():
        raise ArgumentError(f"{shown(str(folder))} is there already; give another name, or remove it")
    words = {"name": name, "package": name.replace("_", "-")}
    texts = {
        f"{name}.py": _definition(name),
        f"test_{name}.py": _TEST.substitute(words),
        "README.md": _README.substitute(words),
        "pyproject.toml": _PYPROJECT.substitute(words),
    }
    with scratch_beside(folder) as scratch:
        for file, text in texts.items():
            (scratch / file).write_text(text, encoding="utf-8")
        place(scratch, folder, list(texts))
    return folder


def _checked(name: str) -> str:
    if not _NAME.fullmatch(name) or keyword.iskeyword(name):
        raise ArgumentError(
            f"{shown(name)} can't be the name of an architecture and of its module; it has lower-case letters, digits "
            "and underscores, such as 'my_net'"
        )
    if name in list_architectures():
        raise ArgumentError(f"an architecture {shown(name)} is in the zoo already; give another name")
    if importlib.util.find_spec(name) is not None:
        raise ArgumentError(
            f"a module {shown(name)} is installed already, which this would hide; give another name"
        )
    return name


def _definition(name: str) -> str:
    """The template under another name: its class as well, and its docstring says what to do in a project."""
    template = files("qzoo.models").joinpath("_template.py").read_text(encoding="utf-8")
    class_name = "".join(part.capitalize() for part in name.split("_"))
    text = template.replace("tiny_net", name).replace("TinyNet", class_name)
    return re.sub(
        r"\nTo add a family:.*?\n\"\"\"",
        f'\n``test_{name}.py`` checks each of these statements by running it.\n"""',
        text,
        count=1,
        flags=re.DOTALL,
    )
