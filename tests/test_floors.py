"""The package's floors: a module imports from its own floor or below, and no imports go in a circle.

Values, tools, what a model is, what is done to it, jobs, commands (docs/architecture.md). The imports are read from the
source, those inside functions too; nothing is imported.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "qzoo"
FLOORS = (
    "errors options preprocessing progress scheme version",
    "data distributed fields files hub_mixin quant registry runtimes",
    "accuracy config qat quantizers",
    "analysis cards export models placement ptq training zoo",
    "bench deployment pipeline prediction release",
    "__init__ commands",
    "__main__",
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS, 1) for room in rooms.split()}
UPWARD = {("hub_mixin", "__init__")}  # a method of every model that calls the public functions
FLAT = 16


def modules() -> dict[str, Path]:
    """Dotted names below the package, with their files."""
    names = {}
    for path in [*PACKAGE.rglob("*.py"), *(PACKAGE / "models").glob("*.py")]:
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        names[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return names


def imports(name: str, path: Path, known: set[str]) -> set[str]:
    """Modules of the package that a file imports when it runs; those for type checkers only are left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    typing = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and "TYPE_CHECKING" in ast.dump(block.test)
        for node in ast.walk(block)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in typing:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = f"qzoo.{name}".split(".")
                above = above[: len(above) - node.level + (path.name == "__init__.py")]
                base = ".".join([*above, *([node.module] if node.module else [])])
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return {m for text in found if (m := _module(text, known)) and m != name}


def _module(text: str, known: set[str]) -> str | None:
    """The module that an imported dotted name lies in."""
    if text != "qzoo" and not text.startswith("qzoo."):
        return None
    below = text.removeprefix("qzoo").lstrip(".")
    while below and below not in known:
        below = below.rpartition(".")[0]
    return below or "__init__"


@pytest.fixture(scope="module")
def graph() -> dict[str, set[str]]:
    paths = modules()
    return {name: imports(name, path, set(paths)) for name, path in paths.items()}


def test_every_module_has_a_floor(graph: dict[str, set[str]]) -> None:
    assert {name.partition(".")[0] for name in graph} == set(FLOOR)


def test_no_import_runs_upward(graph: dict[str, set[str]]) -> None:
    upward = [
        f"qzoo.{name} (floor {here}) imports qzoo.{other} (floor {there})"
        for name, others in sorted(graph.items())
        for other in sorted(others)
        if (here := FLOOR[name.partition(".")[0]]) < (there := FLOOR[other.partition(".")[0]])
        and (name, other) not in UPWARD
    ]
    assert not upward, "\n".join(upward)


def test_no_imports_go_in_a_circle(graph: dict[str, set[str]]) -> None:
    left = {name: others - {"__init__"} for name, others in graph.items() if name != "__init__"}
    while done := {name for name, others in left.items() if not others & left.keys()}:
        left = {name: others for name, others in left.items() if name not in done}
    while ends := left.keys() - {other for others in left.values() for other in others}:
        left = {name: others for name, others in left.items() if name not in ends}
    rows = [f"qzoo.{name} imports {', '.join(sorted(others & left.keys()))}" for name, others in left.items()]
    assert not left, "\n".join(rows)


def test_few_modules_lie_flat() -> None:
    flat = [path.stem for path in PACKAGE.glob("*.py") if not path.stem.startswith("__")]
    assert len(flat) <= FLAT, sorted(flat)


QUANT = PACKAGE / "quant"
OWNERS = {"self", "cls", "super()"}  # what has private names of its own; torch's are not the core's to change


def private_names(tree: ast.AST) -> set[str]:
    """Private names that a file defines: functions, classes, variables, attributes and properties."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Constant) and node.value in ("_amax", "_pre_quant_scale"):
            names.add(str(node.value))
    return {name for name in names if name.startswith("_") and not name.startswith("__") and len(name) > 1}


def private_accesses(tree: ast.AST, private: set[str]) -> list[tuple[int, str]]:
    """Lines where a file reaches for a private name of another object, also by ``getattr`` and ``import``."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in private:
            owner = ast.unparse(node.value)
            if owner not in OWNERS and not owner.startswith(("nn.", "torch.")):
                found.append((node.lineno, f"{owner}.{node.attr}"))
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr", "hasattr"):
            if isinstance(node.args[1], ast.Constant) and node.args[1].value in private:
                found.append((node.lineno, ast.unparse(node)))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("qzoo.quant"):
            found.extend((node.lineno, alias.name) for alias in node.names if alias.name in private)
    return found


def test_only_the_core_reaches_for_its_private_names() -> None:
    private: set[str] = set()
    for path in QUANT.rglob("*.py"):
        private |= private_names(ast.parse(path.read_text(encoding="utf-8")))
    assert {"_amax", "_if_quant", "_calibrator", "_weight_quantizer"} <= private
    rows = [
        f"{path.relative_to(PACKAGE.parent)}:{line}: {text}"
        for folder in (PACKAGE, PACKAGE / "models", PACKAGE.parent / "benchmarks")
        for path in sorted(folder.rglob("*.py"))
        if QUANT not in path.parents
        for line, text in private_accesses(ast.parse(path.read_text(encoding="utf-8")), private)
    ]
    assert not rows, "\n".join(rows)
