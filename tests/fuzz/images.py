"""Images for the fuzz: every format damaged, headers that lie, and one picture in all lossless forms."""

from __future__ import annotations

import io
import random
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from qzoo.data.files import FORMATS, open_image
from qzoo.errors import DataError
from qzoo.preprocessing import Preprocessing
from tests.fuzz.bytes import damaged
from tests.fuzz.cases import Case, Wrong

_SIZES = (0, 1, 2, 7, 255, 256, 4096, 10_000, 60_000, 65_535, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
_COLOUR, _GREY = Preprocessing(), Preprocessing((1, 28, 28), 1.0, mean=(0.5,), std=(0.5,))
_MODES = {
    "JPEG": ("L", "RGB", "CMYK"),
    "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("1", "L", "P", "RGB"),
    "GIF": ("L", "P", "RGB"),
    "TIFF": ("1", "L", "RGB", "RGBA", "CMYK", "YCbCr", "LAB", "I;16", "I", "F"),
    "PPM": ("1", "L", "RGB", "I", "F"),
}


def prepare(folder: Path) -> Case:
    """The case of images."""

    def case(rng: random.Random) -> str:
        path = folder / f"x{rng.choice(list(FORMATS))}"
        try:
            kind = rng.choice((_damaged, _damaged, _lying, _same))
            return kind(rng, path)
        finally:
            for left in folder.iterdir():
                left.unlink()

    return case


def _read(path: Path, preprocessing: Preprocessing) -> torch.Tensor | None:
    """The tensor, checked; None if it is refused."""
    try:
        image = open_image(path, "L" if preprocessing.input_size[0] == 1 else "RGB")
        tensor: torch.Tensor = preprocessing.transform()(image)
    except DataError as error:
        if str(path) not in str(error):
            raise Wrong(f"the message does not name {path.name}: {error}") from error
        return None
    if tensor.shape != preprocessing.input_size or not torch.isfinite(tensor).all():
        raise Wrong(f"{path.name} became {list(tensor.shape)}, or is not finite")
    return tensor


def _damaged(rng: random.Random, path: Path) -> str:
    kind = rng.choice(FORMATS[path.suffix])
    content = _encoded(_picture(rng), kind, rng)
    path.write_bytes(damaged(content, rng, head=rng.choice((64, 512, len(content)))))
    return "refused" if _read(path, rng.choice((_COLOUR, _GREY))) is None else "accepted"


def _picture(rng: random.Random) -> Image.Image:
    size = (rng.randint(1, 40), rng.randint(1, 40), 3)
    return Image.fromarray(np.random.default_rng(rng.getrandbits(32)).integers(0, 256, size, dtype=np.uint8))


def _encoded(picture: Image.Image, kind: str, rng: random.Random) -> bytes:
    mode = rng.choice(_MODES[kind])
    if mode == "I;16":
        picture = Image.fromarray(np.asarray(picture.convert("L")).astype(np.uint16) * 257)
    elif mode == "LAB":
        picture = Image.merge("LAB", picture.split())
    else:
        picture = picture.convert(mode)
    options: dict[str, object] = {}
    if kind == "TIFF" and mode in ("L", "RGB"):
        options["compression"] = rng.choice(("raw", "tiff_lzw", "tiff_adobe_deflate", "packbits", "jpeg"))
    elif kind == "JPEG":
        options = {"progressive": rng.random() < 0.5, "exif": b"Exif\0\0" + bytes(20)}
    elif kind in ("GIF", "WEBP", "PNG", "TIFF") and rng.random() < 0.3:
        options = {"save_all": True, "append_images": [picture.copy()] * 3}
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()


def _lying(rng: random.Random, path: Path) -> str:
    """Headers of any size with little behind them."""
    width, height = rng.choice(_SIZES), rng.choice(_SIZES)
    body = bytes(rng.randint(0, 300))
    if rng.random() < 0.1:
        body = bytes(min((width * 3 + 1) * height, 3 * 10**7))  # compresses well
    if path.suffix == ".bmp":
        bits, squeezed = rng.choice((1, 4, 8, 16, 24, 32)), rng.choice((0, 0, 1, 2, 3))
        info = struct.pack(
            "<IiiHHIIiiII", 40, min(width, 2**31 - 1), min(height, 2**31 - 1), 1, bits, squeezed, *[0] * 5
        )
        content = b"BM" + struct.pack("<IHHI", 54 + len(body), 0, 0, 54) + info + body
    elif path.suffix == ".gif":
        screen = struct.pack("<HHBBB", width % 2**16, height % 2**16, 0x80, 0, 0) + bytes(6)
        frame = b"," + struct.pack("<HHHHB", 0, 0, width % 2**16, height % 2**16, 0) + b"\2\2\x4c\1\0;"
        content = b"GIF89a" + screen + frame
    elif path.suffix in (".ppm", ".pgm"):
        content = (
            f"P{rng.randint(1, 6)} {width} {height} {rng.choice((1, 255, 4095, 65535))}\n".encode() + body
        )
    elif path.suffix in (".tif", ".tiff"):
        entries = [
            (256, 4, width),
            (257, 4, height),
            (258, 3, rng.choice((1, 8, 12, 16, 32))),
            (259, 3, rng.choice((1, 5, 7, 8))),
        ]
        entries += [
            (262, 3, rng.randint(0, 3)),
            (273, 4, 8),
            (277, 3, rng.choice((1, 3, 4))),
            (278, 4, height),
            (279, 4, len(body)),
        ]
        entries += [(322, 4, rng.choice(_SIZES)), (323, 4, rng.choice(_SIZES))] if rng.random() < 0.3 else []
        table = b"".join(struct.pack("<HHII", tag, kind, 1, value) for tag, kind, value in entries)
        content = (
            b"II*\0"
            + struct.pack("<I", 8 + len(body))
            + body
            + struct.pack("<H", len(entries))
            + table
            + bytes(4)
        )
    else:
        bits, colour = rng.choice(((8, 0), (8, 2), (16, 0), (1, 0), (8, 3), (16, 2), (8, 6)))
        rows = zlib.compress(body, 9)
        chunks = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, rng.randint(0, 1)))]
        if rng.random() < 0.2:
            chunks.append((rng.choice((b"zTXt", b"iCCP")), b"a\0\0" + zlib.compress(bytes(10**8), 9)))
        chunks += [(b"IDAT", rows), (b"IEND", b"")]
        content = b"\x89PNG\r\n\x1a\n" + b"".join(
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
            for kind, data in chunks
        )
    path.write_bytes(content)
    return "refused" if _read(path, rng.choice((_COLOUR, _GREY))) is None else "accepted"


def _same(rng: random.Random, path: Path) -> str:
    """One picture in every lossless format, in colour or grey of 8 or 16 bits, is one tensor."""
    grey, preprocessing = rng.random() < 0.5, rng.choice((_COLOUR, _GREY))
    picture = _picture(rng).convert("L" if grey else "RGB")
    forms = {".png": "PNG", ".bmp": "BMP", ".tif": "TIFF", ".ppm": "PPM"} | (
        {} if grey else {".webp": "WEBP"}
    )
    tensors = {}
    for suffix, kind in forms.items():
        picture.save(path.with_suffix(suffix), format=kind, **({"lossless": True} if kind == "WEBP" else {}))
        tensors[suffix] = _read(path.with_suffix(suffix), preprocessing)
    if grey:
        deep = Image.fromarray(np.asarray(picture).astype(np.uint16) * 257)
        for suffix in (".png", ".tif"):
            deep.save(path.with_suffix(suffix))
            tensors[f"16 bits{suffix}"] = _read(path.with_suffix(suffix), preprocessing)
    for form, tensor in tensors.items():
        if tensor is None or not torch.equal(tensor, tensors[".png"]):  # type: ignore[arg-type]
            raise Wrong(f"{picture.mode} of {picture.size} is another tensor as {form}")
    return "accepted"
