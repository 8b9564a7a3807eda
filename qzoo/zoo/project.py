"""A project of one's own: a package with one architecture, its tests and its commands, for ``qzoo new``."""

from __future__ import annotations

import importlib.util
import keyword
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from string import Template

import torch
from torch import nn

from qzoo.errors import ArgumentError, shown
from qzoo.export.check import check
from qzoo.export.lint import coverage, lint
from qzoo.export.onnx import export_onnx
from qzoo.files import place, scratch_beside, temporary_folder
from qzoo.placement.factory import build_float, preprocessing_of
from qzoo.placement.model import quantize
from qzoo.ptq.ranges import calibrate
from qzoo.quant.nn import TensorQuantizer
from qzoo.quantizers import quantizers, quantizers_off
from qzoo.registry import PLUGINS, list_architectures
from qzoo.scheme import TARGETS

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

$about Then train it on a folder with one subfolder of images a class,
quantize it, and measure it against other tools:

```bash
qzoo train $name.own --dataset folders --data DIR
qzoo build $name.own-w8a8 --data DIR
qzoo benchmark $name.own-w8a8 --data DIR --compare quantize_static --out report
```

In Python: `qzoo.create_model("$name")`.
""")

_ABOUT = (
    "Put your layers into the definition; the comments there say what only the author of a network knows."
)
_FROM_ABOUT = Template(
    "`PLACEMENT` in `$name.py` lists the quantizers that `qzoo.quantize` places, and `EXCLUDE` leaves modules in float."
)

_TEST = Template('''\
"""$name: equal to its reference, quantized where each runtime wants it, and in int8 as it was simulated."""

from __future__ import annotations

from pathlib import Path

import $name
import pytest
import qzoo
$imports
from qzoo.export.lint import coverage
from qzoo.quantizers import quantizers, quantizers_off
from torch import nn

$constants

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
    plain = $name.$name(num_classes=$classes).eval()
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


@pytest.mark.parametrize("target", SHARES)
def test_file_runs_in_int8(model: nn.Module, tmp_path: Path, target: str) -> None:
    path = qzoo.export_onnx(
        model, tmp_path / "model.onnx", target=target, example=torch.zeros(1, 3, SIZE, SIZE)
    )
    assert {finding.rule for finding in qzoo.lint(path, target)} <= FINDINGS.get(target, set())
    assert coverage(path, target).share >= SHARES[target]


def test_file_computes_what_was_simulated(
    model: nn.Module, images: torch.Tensor, tmp_path: Path
) -> None:
    path = qzoo.export_onnx(model, tmp_path / "model.onnx", example=images[:1])
    check = qzoo.export.check(path, model, images)
    assert check.sqnr_db > SQNR_DB, check
''')

_CONSTANTS = """\
# An independent implementation with the same parameter names, such as ``torchvision.models.resnet18()``, and the size
# of the images that both take.
REFERENCE: nn.Module | None = None
SIZE = 32

# What has to hold: the share of the multiply-adds in int8, rules of lint that may find something, and how near the file
# is to the simulation.
SHARES = {"onnxruntime": 1.0, "openvino": 1.0, "tensorrt": 1.0}
FINDINGS: dict[str, set[str]] = {}
SQNR_DB = 30
"""

_FROM_CONSTANTS = Template("""\
# An independent implementation with the same parameter names, and the size of the images that both take.
REFERENCE: nn.Module | None = $call
SIZE = $size

# What held when the project was made, with random weights: the share of the multiply-adds in int8, the rules of lint
# that find something, and how near the file is to the simulation.
SHARES = {$shares}
FINDINGS: dict[str, set[str]] = {$findings}
SQNR_DB = $sqnr_db


def test_quantizers_are_where_the_definition_says() -> None:
    assert $name.placement($name.$name(quantize=qzoo.Scheme())) == $name.PLACEMENT
""")

_FROM_DEFINITION = Template('''\
"""$name: $source, with quantizers where ``qzoo.quantize`` puts them.

The network is the package's own, run once to see every operation. ``PLACEMENT`` lists what that gave, beside the
quantizers on the input and the weight of each layer: the roles are those of ``qzoo.scheme``, by which a target switches
them. It is a worked example for a definition of your own (``qzoo new`` without ``--from`` starts one), and a guard: the
test fails when another version of the package, or an edit here, places them otherwise.
"""

from __future__ import annotations

from typing import Any

import qzoo
$imports
from qzoo.quantizers import quantizers
from qzoo.registry import $registry
from torch import nn

SIZE = $native
EXCLUDE: tuple[str, ...] = ()  # modules that stay in float, by shell patterns on their names

PLACEMENT = {
$placement
}


@register_model(${family}num_classes=$classes)
def $name(**options: Any) -> nn.Module:
    """$source as an architecture of the zoo."""
    classes, channels, scheme = options["num_classes"], options["in_channels"], options["quantize"]
    network = $built
    if scheme is None:
        return network
    return qzoo.quantize(network, torch.zeros(1, channels, SIZE, SIZE), scheme, exclude=EXCLUDE)


def placement(model: nn.Module) -> dict[str, str]:
    """The quantizers beside those of the layers: the role of each, and whether its input is never negative."""
    return {
        name: f"{quantizer.role}, never negative" if quantizer.nonnegative else quantizer.role
        for name, quantizer in quantizers(model).items()
        if quantizer.role not in ("input", "weight")
    }
''')


@dataclass(frozen=True)
class _Start:
    """A network that a project starts from, and what holds of it when it is quantized.

    Attributes:
        package, network: of ``"timm:resnet18"``.
        native, size: of the images that it is for, and of those of the tests.
        classes: of its classifier.
        affine: its activations have zero points where nothing else is said.
        placement: roles of its quantizers beside those of the layers, by name.
        shares, findings: see ``SHARES`` and ``FINDINGS`` of the project's test.
        sqnr_db: of the file in ONNX Runtime against the simulation.
    """

    package: str
    network: str
    native: int
    size: int
    classes: int
    affine: bool
    placement: Mapping[str, str]
    shares: Mapping[str, float]
    findings: Mapping[str, set[str]]
    sqnr_db: int

    @property
    def call(self) -> str:
        """The package's own call."""
        if self.package == "timm":
            return f'timm.create_model("{self.network}")'
        return f'torchvision.models.get_model("{self.network}", weights=None)'

    @property
    def built(self) -> str:
        """The call with the options of a definition."""
        if self.package == "timm":
            return f'timm.create_model("{self.network}", num_classes=classes, in_chans=channels)'
        return f'torchvision.models.get_model("{self.network}", weights=None, num_classes=classes)'


def write_project(name: str, parent: str | Path = ".", start: str | None = None) -> Path:
    """Write a project with one architecture: definition, test, README and package metadata.

    Its test passes at once; ``pip install -e`` in it makes the zoo find the architecture by the entry point group
    ``qzoo.models``.

    Args:
        name: of the architecture, its module and the folder, such as ``"my_net"``.
        parent: where to make the folder.
        start: a network to start from, ``"timm:NAME"`` or ``"torchvision:NAME"``, quantized by :func:`qzoo.quantize`
            and exported for each target to know what holds of it; None starts from a template.

    Returns:
        The new folder.

    Raises:
        ArgumentError: a name that no module can have, or one that is taken; the folder is there already; a start
            that is no network of these packages, or one that can't be quantized.

    Example:
        >>> folder = write_project("my_net")
        >>> sorted(path.name for path in folder.iterdir())
        ['README.md', 'my_net.py', 'pyproject.toml', 'test_my_net.py']
    """
    folder = Path(parent) / _checked(name)
    if folder.exists() or folder.is_symlink():
        raise ArgumentError(f"{shown(str(folder))} is there already; give another name, or remove it")
    words = {"name": name, "package": name.replace("_", "-")}
    definition, constants, imports, classes = _definition(name), _CONSTANTS, "import torch", 1000
    if start is not None:
        studied = _studied(start)
        imports = "\n".join(sorted(("import torch", f"import {studied.package}")))
        classes = studied.classes
        definition, constants = _started(words, imports, studied)
    texts = {
        f"{name}.py": definition,
        f"test_{name}.py": _TEST.substitute(words, constants=constants, imports=imports, classes=classes),
        "README.md": _README.substitute(
            words, about=_ABOUT if start is None else _FROM_ABOUT.substitute(words)
        ),
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


def _started(words: Mapping[str, str], imports: str, start: _Start) -> tuple[str, str]:
    """Definition, and constants of the test, of a project that starts from a network."""
    findings = ", ".join(
        f'"{target}": {{{", ".join(f"{rule!r}" for rule in sorted(rules))}}}'.replace("'", '"')
        for target, rules in start.findings.items()
    )
    definition = _FROM_DEFINITION.substitute(
        words,
        source=f"{start.package}:{start.network}",
        imports=imports,
        native=start.native,
        classes=start.classes,
        built=start.built,
        registry="SWISH, Family, register_model" if start.affine else "register_model",
        family="family=Family(defaults=SWISH), " if start.affine else "",
        placement="\n".join(f'    "{key}": "{role}",' for key, role in start.placement.items()),
    )
    constants = _FROM_CONSTANTS.substitute(
        words,
        call=start.call,
        size=start.size,
        shares=", ".join(f'"{target}": {share}' for target, share in start.shares.items()),
        findings=findings,
        sqnr_db=start.sqnr_db,
    )
    return definition, constants


def _studied(start: str) -> _Start:
    """Quantize a network with random weights, and see what holds of its files."""
    package, _, network = start.partition(":")
    if package not in ("timm", "torchvision"):
        raise ArgumentError(
            f"{shown(start)} is no network to start from; expected timm:NAME or torchvision:NAME"
        )
    torch.manual_seed(0)
    model = build_float(start)
    native = preprocessing_of(model).input_size[-1]
    quantized = quantize(model, torch.zeros(1, 3, native, native))
    size = _smaller(quantized, native)
    images = torch.randn(4, 3, size, size, generator=torch.Generator().manual_seed(0))
    calibrate(quantized, [images], progress=False)
    shares, findings = {}, {}
    with temporary_folder() as folder:
        for target in TARGETS:
            path = export_onnx(quantized, folder / f"{target}.onnx", target=target, example=images[:1])
            # Rounded down: what is measured again may differ in its last digit.
            shares[target] = int(100 * (coverage(path, target).share or 0)) / 100
            findings[target] = {finding.rule for finding in lint(path, target)}
        sqnr_db = check(folder / "onnxruntime.onnx", quantized, images).sqnr_db
    classes = quantized(images[:1]).shape[1]
    return _Start(
        package,
        network,
        native,
        size,
        classes,
        _affine(quantized),
        {
            name: _role(quantizer)
            for name, quantizer in quantizers(quantized).items()
            if _is_beside(quantizer)
        },
        shares,
        {target: rules for target, rules in findings.items() if rules},
        min(30, int(sqnr_db) - 3),
    )


def _affine(model: nn.Module) -> bool:
    return any(quantizer.two_ended for quantizer in quantizers(model).values())


def _smaller(model: nn.Module, native: int) -> int:
    """A size of images that is quick to test with, where the quantized network takes it; its own otherwise."""
    try:
        with torch.no_grad(), quantizers_off(model):
            model(torch.zeros(1, 3, 64, 64))
    except (AssertionError, RuntimeError, ValueError):  # of a fixed size, or quantized for its own alone
        return native
    return min(64, native)


def _is_beside(quantizer: TensorQuantizer) -> bool:
    return quantizer.role not in ("input", "weight")


def _role(quantizer: TensorQuantizer) -> str:
    return f"{quantizer.role}, never negative" if quantizer.nonnegative else str(quantizer.role)
