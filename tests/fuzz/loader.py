"""Checkpoints for the fuzz: as a bad disk leaves them, and as an attacker makes them."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import qzoo
from qzoo.cards.card import card
from qzoo.config import WEIGHTS, Config
from qzoo.errors import CheckpointError
from qzoo.zoo import hub
from tests.fuzz.bytes import DTYPES, damaged, places, replaced
from tests.fuzz.cases import Case, Wrong

NAMES = ("resnet20.fmnist", "resnet20.fmnist-w8a8", "resnet20.fmnist-w4a4_qat", "resnet32.fmnist-w2a2_qat")
_VALUES: tuple[Any, ...] = (
    *(None, True, False, 0, -1, 1, 3, 7, 9, 2**31, 2**63, 2**64 - 1, 10**400, 0.5, 1e308, math.inf, math.nan),
    *("", "a", "\ud800", "\0", "../x", "w8a8", "float", "tensorrt", "9" * 300),
    *([], {}, [0], [[[[[[]]]]]] * 2, {"a": {}}, [2**62, 4], [-1], [4, 0], [0, 2**63]),
    *DTYPES,
)


@dataclasses.dataclass(frozen=True)
class Undamaged:
    """A checkpoint's two files, and what it computes."""

    config: bytes
    weights: bytes
    images: Tensor
    logits: Tensor


def prepare(folder: Path) -> Case:
    """The case of the loader."""
    known = [_undamaged(name) for name in NAMES]

    def case(rng: random.Random) -> str:
        shutil.rmtree(folder)
        folder.mkdir()
        kind = rng.choice(
            (_disk, _disk, _config, _config, _hostile_config, _hostile_weights, _hostile_weights)
        )
        return kind(rng, folder, rng.choice(known), rng.choice(known))

    return case


def _undamaged(name: str) -> Undamaged:
    folder = hub.EMBEDDED / name
    images = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    logits = _logits(qzoo.load_pretrained(folder), images)
    return Undamaged((folder / "config.json").read_bytes(), (folder / WEIGHTS).read_bytes(), images, logits)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        logits: Tensor = model(images)
    return logits


def _load(folder: Path, config: bytes, weights: bytes) -> nn.Module | None:
    """The model; None if it is refused."""
    (folder / "config.json").write_bytes(config)
    (folder / WEIGHTS).write_bytes(weights)
    try:
        return qzoo.load_pretrained(folder)
    except CheckpointError:
        return None


def _same(model: nn.Module | None, known: Undamaged) -> str:
    if model is None:
        return "refused"
    if not torch.equal(_logits(model, known.images), known.logits):
        raise Wrong("other logits than the undamaged checkpoint's")
    return "accepted"


def _disk(rng: random.Random, folder: Path, known: Undamaged, other: Undamaged) -> str:
    """Either file damaged, or those of two checkpoints mixed."""
    kind = rng.choice(("weights", "weights", "both", "mixed"))
    if kind == "mixed":
        return "refused" if known is other else _same(_load(folder, known.config, other.weights), known)
    config = damaged(known.config, rng) if kind == "both" else known.config
    return _same(_load(folder, config, damaged(known.weights, rng)), known)


def _config(rng: random.Random, folder: Path, known: Undamaged, other: Undamaged) -> str:
    """One bit of config.json is another one, or a part is missing: no hash vouches for that file."""
    config = bytearray(known.config)
    if rng.random() < 0.9:
        # Three quarters of the file are measurements, whose bits change nothing.
        at = rng.randrange(config.index(b'"metrics"') if rng.random() < 0.8 else len(config))
        config[at] ^= 1 << rng.randrange(8)
    else:
        at = rng.randrange(len(config))
        del config[at : at + rng.choice((1, 8, 512, len(config)))]
    return _same(_load(folder, bytes(config), known.weights), known)


def _hostile_config(rng: random.Random, folder: Path, known: Undamaged, other: Undamaged) -> str:
    """JSON of any kind in any place: what is accepted can be written, read again and shown on a card."""
    values = json.loads(known.config)
    for _ in range(rng.randint(1, 2)):
        place = rng.choice(list(places(values)))
        values = replaced(values, place, rng.choice((..., rng.choice(_VALUES), rng.choice(_VALUES))))
    text = json.dumps(values)
    if rng.random() < 0.2:
        at = rng.randrange(len(text))
        text = text[:at] + rng.choice(("[", "{", '"', "1e999", "\\ud800", "[" * 10_000)) + text[at:]
    try:
        config = Config.from_json(text)
    except CheckpointError:
        return "refused"
    if Config.from_json(config.to_json()) != copy.deepcopy(config):
        raise Wrong("the config is another one when it is written and read again")
    (config.to_json() + card(config)).encode()
    return _checked(_load(folder, text.encode(), known.weights), folder)


def _hostile_weights(rng: random.Random, folder: Path, known: Undamaged, other: Undamaged) -> str:
    """Weights of any kind, with a config.json that vouches for them."""
    (size,) = struct.unpack("<Q", known.weights[:8])
    header, body = json.loads(known.weights[8 : 8 + size]), bytearray(known.weights[8 + size :])
    kind = rng.choice(("value", "value", "key", "size", "text", "numbers", "numbers", "bytes"))
    length: int | None = None
    if kind == "value":
        place = rng.choice(list(places(header)))
        header = replaced(header, place, rng.choice((..., rng.choice(_VALUES), rng.choice(DTYPES))))
    elif kind == "key":
        old, new = rng.choice(sorted(header)), rng.choice(sorted(header))
        header[new] = header.pop(old)
    elif kind == "size":
        length = rng.choice((rng.randrange(2**64), rng.randrange(5000), 2**40, 100_000_001))
    elif kind == "numbers":
        number = struct.pack(
            "<f", rng.choice((math.nan, math.inf, -math.inf, -1.0, 0.0, 1e-40, 3e38, rng.gauss(0, 1)))
        )
        tensor = rng.choice([entry for key, entry in sorted(header.items()) if key != "__metadata__"])
        start, stop = tensor["data_offsets"]
        if stop - start >= 4:
            at = start + 4 * rng.randrange((stop - start) // 4)
            body[at : at + 4] = number
    text = json.dumps(header).encode("utf-8", "surrogatepass")
    if kind == "text":
        at = rng.randrange(len(text))
        text = text[:at] + rng.randbytes(3) + text[at:]
    weights = struct.pack("<Q", len(text) if length is None else length) + text + bytes(body)
    if kind == "bytes":
        weights = damaged(known.weights, rng)
    (folder / WEIGHTS).write_bytes(weights)
    config = json.loads(known.config)
    config["files"][WEIGHTS] = hub.sha256_of(folder / WEIGHTS)
    return _checked(_load(folder, json.dumps(config).encode(), weights), folder)


def _checked(model: nn.Module | None, folder: Path) -> str:
    """What a stranger made and was accepted is finite, runs, and is the same when it is saved and loaded."""
    if model is None:
        return "refused"
    for name, tensor in model.state_dict().items():
        if tensor.is_meta or not torch.isfinite(tensor).all():
            raise Wrong(f"{name} is not finite, or not there")
    arguments = model.qzoo_config.arguments
    images = torch.randn(1, arguments.in_channels, 28, 28, generator=torch.Generator().manual_seed(0))
    logits = _logits(model, images)
    if logits.shape != (1, arguments.num_classes):
        raise Wrong(f"logits of shape {list(logits.shape)}")
    again = qzoo.load_pretrained(qzoo.save_pretrained(model, folder / "again"))
    if not torch.equal(_logits(again, images), logits) and not logits.isnan().any():
        raise Wrong("it computes something else when it is saved and loaded again")
    return "accepted"
