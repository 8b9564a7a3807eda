"""Check that a wheel holds what an installation needs: ``python .ci/check_wheel.py dist/*.whl``."""

from __future__ import annotations

import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def missing(wheel: Path) -> list[str]:
    """Files of the checkout that should be in the wheel, and are not."""
    names = set(zipfile.ZipFile(wheel).namelist())
    needed = ["qzoo/_C.abi3.so", "qzoo/py.typed"]
    needed += [f"qzoo/bench/page/page.{kind}" for kind in ("html", "css", "js")]
    needed += [str(path.relative_to(ROOT)) for path in (ROOT / "qzoo/data/files").iterdir()]
    for folder in (ROOT / "qzoo").rglob("__init__.py"):
        needed += [str(path.relative_to(ROOT)) for path in folder.parent.glob("*.py")]
    needed += [f"qzoo/models/{path.name}" for path in (ROOT / "models").glob("*.py")]
    needed += [f"qzoo/{p.relative_to(ROOT)}" for p in (ROOT / "model_cards").glob("*/*") if p.is_file()]
    return sorted(set(needed) - names)


def main(paths: list[str]) -> int:
    """Print what is missing and the size of each wheel; 1 where something is wrong."""
    wrong = not paths
    for path in map(Path, paths):
        left = missing(path)
        tagged = "-cp310-abi3-" in path.name
        print(f"{path.name}: {path.stat().st_size / 1e6:.1f} MB; missing: {', '.join(left) or 'nothing'}")
        if not tagged:
            print(f"{path.name}: not for the stable ABI (cp310-abi3)")
        wrong = wrong or bool(left) or not tagged
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
