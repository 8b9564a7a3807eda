"""Image files of every depth, format and degree of malice, against PNGs and pixels written by hand."""

from __future__ import annotations

import os
import struct
import threading
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from qzoo.data.files import FORMATS, open_image
from qzoo.errors import DataError
from qzoo.preprocessing import MAX_PIXELS, MAX_RATIO

GREY16 = (np.arange(40 * 50, dtype=np.uint16) * 32).reshape(40, 50)  # 0 to 63,968


def png(width: int, height: int, rows: bytes, bits: int = 8, colour: int = 0) -> bytes:
    """A PNG by the specification; ``rows`` are the filtered rows."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))
        )

    header = struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def png16(pixels: np.ndarray, colour: int) -> bytes:
    """A 16-bit PNG: grey (colour type 0) or colour (2)."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2").reshape(height, -1).view(np.uint8)
    return png(width, height, np.pad(rows, ((0, 0), (1, 0))).tobytes(), 16, colour)


def reason(path: Path, content: bytes | None = None) -> str:
    """The message of the refusal."""
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(DataError) as error:
        open_image(path)
    assert str(error.value).startswith(f"{path} can't be read as an image (")
    return str(error.value)


def test_16_bits_are_scaled_in_grey_as_in_colour(tmp_path: Path) -> None:
    (tmp_path / "grey.png").write_bytes(png16(GREY16, 0))
    (tmp_path / "colour.png").write_bytes(png16(np.stack([GREY16] * 3, -1), 2))
    Image.fromarray(GREY16).save(tmp_path / "grey.tif")
    (tmp_path / "grey.pgm").write_bytes(b"P5 50 40 65535\n" + GREY16.astype(">u2").tobytes())
    expected = (GREY16 >> 8).astype(np.uint8)
    for name in ("grey.png", "colour.png", "grey.tif", "grey.pgm"):
        np.testing.assert_array_equal(np.asarray(open_image(tmp_path / name, "L")), expected, name)
        np.testing.assert_array_equal(
            np.asarray(open_image(tmp_path / name)), np.stack([expected] * 3, -1), name
        )


@pytest.mark.parametrize(("dtype", "kind"), [(np.int32, "32-bit integers"), (np.float32, "floats")])
def test_depths_without_a_known_white_are_refused(tmp_path: Path, dtype: type, kind: str) -> None:
    Image.fromarray(GREY16.astype(dtype)).save(tmp_path / "deep.tif")
    assert f"it holds {kind}" in reason(tmp_path / "deep.tif")


@pytest.mark.parametrize("suffix", sorted(FORMATS))
def test_8_bits_are_as_pillow_reads_them(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    path = tmp_path / f"x{suffix.upper()}"
    Image.fromarray(pixels).save(path, format=FORMATS[suffix][0])
    with Image.open(path) as image:
        expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(np.asarray(open_image(path)), expected)


def test_only_the_formats_that_the_name_says_are_tried(tmp_path: Path) -> None:
    image = Image.new("RGB", (20, 20), "teal")
    for name, kind in (("a.jpg", "TIFF"), ("b.png", "JPEG"), ("c.jpg", "EPS"), ("d.webp", "GIF")):
        image.save(tmp_path / name, format=kind)
        assert "its content is not" in reason(tmp_path / name)
    image.save(tmp_path / "e.eps")
    assert "its name must end in one of .jpg" in reason(tmp_path / "e.eps")
    image.save(tmp_path / "n02105855_2933.JPEG", format="PNG")  # in ImageNet
    assert open_image(tmp_path / "n02105855_2933.JPEG").getpixel((0, 0)) == (0, 128, 128)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_few_bytes_of_many_pixels_are_refused_unread(tmp_path: Path) -> None:
    assert "the long side" in reason(tmp_path / "thin.png", png(60_000, 1, bytes(60_001)))
    assert "60000 x 1 pixels" in reason(tmp_path / "thin.png")
    huge = reason(tmp_path / "huge.png", png(2**14, 2**13 + 1, b""))  # refused though no pixel is there
    assert f"expected 1 to {MAX_PIXELS}" in huge
    (tmp_path / "edge.png").write_bytes(png(MAX_RATIO * 3, 3, bytes(3 * (MAX_RATIO * 3 + 1))))
    assert open_image(tmp_path / "edge.png").size == (300, 3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_what_is_no_file_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "folder.jpg").mkdir()
    (tmp_path / "device.jpg").symlink_to("/dev/zero")
    (tmp_path / "loop.jpg").symlink_to("loop.jpg")
    messages: dict[str, str] = {}

    def read() -> None:
        for name in ("pipe.jpg", "folder.jpg", "device.jpg", "loop.jpg", "none.jpg", "nul\0.jpg"):
            messages[name] = reason(tmp_path / name)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    thread.join(30)
    assert len(messages) == 6
    assert all("no regular file" in messages[name] for name in ("pipe.jpg", "folder.jpg", "device.jpg"))


DAMAGED = {  # what Pillow raises for them
    "SyntaxError.png": png(4, 4, bytes(20))[:36] + b"\2" + png(4, 4, bytes(20))[37:],  # length of IDAT
    "ValueError.png": png(4, 4, bytes(20)).replace(b"\0\0\0\rIHDR", b"\0\0\0\4IHDR"),
    "ValueError.pgm": b"P5 4 \x004 255\n" + bytes(16),
    "OSError.png": png(4, 4, bytes(20))[:-30],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_every_decoders_error_names_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(DAMAGED[name])
    kind = {"SyntaxError": SyntaxError, "ValueError": ValueError, "OSError": OSError}[Path(name).stem]
    with pytest.raises(kind), Image.open(tmp_path / name) as image:
        image.load()
    reason(tmp_path / name)
