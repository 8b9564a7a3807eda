"""The demo on the site: a checkpoint as ONNX, its labels, and ONNX Runtime for browsers, served by the site itself."""

from __future__ import annotations

import base64
import functools
import hashlib
import json
import logging
import shutil
import subprocess
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import qzoo
from qzoo.config import config_of
from qzoo.data import label_names

CHECKPOINT = "tf_efficientnet_lite0.in1k-w8a8"
PACKAGE = "onnxruntime-web@1.30.0"
# As the npm registry has it: SHA-512 of the archive, in base64.
INTEGRITY = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
RUNTIME = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
CACHE = Path(__file__).parent.parent / ".cache" / "onnxruntime-web.tgz"

logger = logging.getLogger("mkdocs.hooks.demo")


@functools.cache  # mkdocs serve builds again and again
def demo() -> dict[str, str | bytes]:
    """The demo's files by their path in the site; none without npm, which fetches the runtime, and the page says so."""
    if not CACHE.exists() and shutil.which("npm") is None:
        logger.info("no npm, which fetches %s: the site's demo has no runtime", PACKAGE)
        return {}
    model = qzoo.create_model(CHECKPOINT, pretrained=True)
    config = config_of(model)
    told = {"name": CHECKPOINT, "labels": label_names(config.labels)}
    told |= {key: getattr(config.preprocessing, key) for key in ("input_size", "crop_pct", "mean", "std")}
    with TemporaryDirectory() as folder:
        file = qzoo.export_onnx(model, Path(folder) / "model.onnx", target="onnxruntime").read_bytes()
    return {"demo/model.onnx": file, "demo/model.json": json.dumps(told), **runtime()}


def runtime() -> dict[str, bytes]:
    """ONNX Runtime for browsers, from the cache or the npm registry.

    Raises:
        ValueError: the archive is not the one that is pinned here.
    """
    if not CACHE.exists():
        with TemporaryDirectory() as folder:
            subprocess.run(["npm", "pack", PACKAGE, "--silent"], cwd=folder, check=True, capture_output=True)
            (archive,) = Path(folder).iterdir()
            CACHE.parent.mkdir(exist_ok=True)
            part = CACHE.with_suffix(".part")
            shutil.copy(archive, part)
            part.replace(CACHE)
    digest = base64.b64encode(hashlib.sha512(CACHE.read_bytes()).digest()).decode()
    if digest != INTEGRITY:
        raise ValueError(f"{CACHE} is not {PACKAGE} as pinned in {__file__}; remove it")
    files: dict[str, bytes] = {}
    with tarfile.open(CACHE) as archive:
        for name in RUNTIME:
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None
            files[f"demo/{name}"] = member.read()
    return files
