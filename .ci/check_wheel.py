"""Check a release: ``python .ci/check_wheel.py wheelhouse/*.whl``, in an environment with ``pip install -e ".[dev]"``.

Looks at the wheel's name, version, changelog and contents; then installs it in a new environment, which sees neither
the checkout nor a compiler, and runs the README's main job and a part of the tests there. That environment sees this
one's packages; with ``--download`` pip gets the wheel's dependencies as a user's does. ``--unreleased`` is for a wheel
of a version that the changelog gives no date yet.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import site
import subprocess
import sys
import venv
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
# What fails first where the package lacks a file, kernels, or something that only the checkout has.
SMOKE = (
    "tests/test_import.py",
    "tests/test_preprocessing.py",
    "tests/quant/test_native.py",
    "tests/quant/test_walkthrough.py",
    "tests/zoo/test_checkpoint.py",
    "tests/data/test_tensors.py",
)
JOB = ("benchmark", "resnet20.fmnist-w8a8", "--runtimes", "onnxruntime", "--seconds", "1", "--out", "report")


def named_wrongly(wheel: Path, unreleased: bool) -> list[str]:
    """What is wrong with the wheel's name, its version and the changelog, which may give it no date yet."""
    (version,) = re.findall(r'^__version__ = "(.+)"$', _text("qzoo/version.py"), re.MULTILINE)
    heading = re.findall(r"^## (.+)$", _text("CHANGELOG.md"), re.MULTILINE)[0]
    wrong = []
    if not wheel.name.startswith(f"qzoo-{version}-"):
        wrong.append(f"it is not of version {version} (qzoo/version.py)")
    if "-cp310-abi3-" not in wheel.name:
        wrong.append("it is not for the stable ABI (cp310-abi3)")
    if "manylinux" not in wheel.name:
        wrong.append("it is for this machine only: auditwheel repair")
    if heading.split()[0] != version:
        wrong.append(f"CHANGELOG.md begins with {heading!r}, and not with {version} (qzoo/version.py)")
    if "unreleased" in heading and not unreleased:
        wrong.append(
            f"CHANGELOG.md says {heading!r}: put the date there to release it; --unreleased checks the rest before"
        )
    return wrong


def incomplete(wheel: Path) -> list[str]:
    """Files of the checkout that the wheel lacks, or has otherwise: code, page, images, cards and checkpoints."""
    archive = zipfile.ZipFile(wheel)
    names = set(archive.namelist())
    page = ("page.html", "page.css", "draw.js", "page.js", "survey.js")
    needed = {f"qzoo/bench/page/{name}": ROOT / "qzoo/bench/page" / name for name in page}
    needed["qzoo/py.typed"] = ROOT / "qzoo/py.typed"
    needed |= {f"qzoo/data/files/{path.name}": path for path in (ROOT / "qzoo/data/files").iterdir()}
    for folder in (ROOT / "qzoo").rglob("__init__.py"):
        needed |= {str(path.relative_to(ROOT)): path for path in folder.parent.glob("*.py")}
    needed |= {f"qzoo/models/{path.name}": path for path in (ROOT / "models").glob("*.py")}
    cards = [path for path in (ROOT / "model_cards").glob("*/*") if path.is_file()]
    needed |= {f"qzoo/{path.relative_to(ROOT)}": path for path in cards}
    wrong = [f"{name} is missing" for name in {*needed, "qzoo/_C.abi3.so"} - names]
    wrong += [
        f"{name} is another"
        for name in needed.keys() & names
        if archive.read(name) != needed[name].read_bytes()
    ]
    return sorted(wrong)


def broken(wheel: Path, download: bool) -> list[str]:
    """What does not work where the wheel is installed, and nothing else of the checkout is at hand."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        python = _installed(wheel, folder / "venv", download)
        (folder / "work").mkdir()
        shutil.copytree(ROOT / "tests", folder / "work/tests", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", folder / "work")
        steps = {
            "qzoo env": ("-m", "qzoo", "env"),
            "the README's main job": ("-m", "qzoo", *JOB),
            "qzoo verify": ("-m", "qzoo", "verify"),
            "the smoke part of the tests": ("-m", "pytest", "-n", "0", *SMOKE),
        }
        wrong = []
        for step, arguments in steps.items():
            code, printed = _run(python, *arguments, folder=folder / "work")
            if code:
                wrong.append(f"{step} failed:\n{printed[-3000:]}")
            if step == "qzoo env" and not re.search(r"kernels \(cpu\) +native", printed):
                wrong.append(f"its kernels do not run:\n{printed}")
        return wrong


def _installed(wheel: Path, folder: Path, download: bool) -> Path:
    """The interpreter of a new environment with the wheel in it, and its dependencies or the packages of this one."""
    venv.create(folder, with_pip=True)
    python = folder / "bin/python"
    what = [f"{wheel.resolve()}[test]"] if download else ["--no-deps", "--no-index", str(wheel.resolve())]
    code, printed = _run(python, "-m", "pip", "install", *what, folder=folder)
    if code:
        raise SystemExit(printed)
    if not download:
        (own,) = folder.glob("lib/python*/site-packages")
        (own / "dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return python


def _run(python: Path, *arguments: str, folder: Path) -> tuple[int, str]:
    """Exit status and output of the interpreter, which finds no compiler and nothing that the caller set."""
    env = {
        key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "PYTEST", "QZOO"))
    }
    env |= {"PATH": str(python.parent), "QZOO_HOME": str(folder / "home")}
    done = subprocess.run(
        [python, *arguments], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout + done.stderr


def _text(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def main(arguments: list[str]) -> int:
    """Print each wheel's size and what is wrong with it; 1 where something is."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition(":")[0])
    parser.add_argument("wheels", nargs="+", type=Path)
    parser.add_argument(
        "--unreleased", action="store_true", help="the changelog gives the version no date yet"
    )
    parser.add_argument(
        "--download", action="store_true", help="have pip get the dependencies, as a user's does"
    )
    args = parser.parse_args(arguments)
    wrong = False
    for wheel in args.wheels:
        found = [
            *named_wrongly(wheel, args.unreleased),
            *incomplete(wheel),
            *broken(wheel, args.download),
        ]
        print(f"{wheel.name}: {wheel.stat().st_size / 1e6:.1f} MB; {'nothing is wrong' if not found else ''}")
        print("".join(f"  {line}\n" for line in found), end="")
        wrong = wrong or bool(found)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
