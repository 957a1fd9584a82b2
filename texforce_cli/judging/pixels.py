"""A picture as a judge may see it: pixels, without a word of where they come from."""

from __future__ import annotations

import base64
import functools
import hashlib
import io
import struct
from pathlib import Path

from texforce_cli.judging.judge import Failed

_PNG = b"\x89PNG\r\n\x1a\n"
_PIXELS = {b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"}


@functools.lru_cache(maxsize=64)
def data_url(path: Path, sha256: str) -> str:
    """A `data:` URL of a picture: the bytes of a PNG that holds pixels only, else a new PNG of the same pixels.

    All pictures are sent as PNG, so that the format cannot tell one variant from another.

    Raises:
        Failed: the file cannot be read, or is no longer the one with this SHA-256.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise Failed(f"'{path}' cannot be read ({error.strerror or error})", retry=False, asked=False) from error
    if hashlib.sha256(data).hexdigest() != sha256:
        raise Failed(f"'{path}' has changed since this run began", "run the command again", retry=False, asked=False)
    shown = data if _bare(data) else _redrawn(path, data)
    return "data:image/png;base64," + base64.b64encode(shown).decode("ascii")


def _bare(data: bytes) -> bool:
    """Whether this is a PNG of nothing but pixels: no text, EXIF, profile or time, and nothing behind its end."""
    if not data.startswith(_PNG):
        return False
    position, kind = len(_PNG), b""
    while kind != b"IEND" and position + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        if kind not in _PIXELS:
            return False
        position += 12 + length
    return kind == b"IEND" and position == len(data)


def _redrawn(path: Path, data: bytes) -> bytes:
    """The pixels as a new PNG, upright."""
    from PIL import Image, ImageOps

    from texforce_cli.report.pictures import BROKEN

    try:
        with Image.open(io.BytesIO(data)) as opened:
            upright = ImageOps.exif_transpose(opened)
            image = upright.convert("RGBA" if upright.has_transparency_data else "RGB")
    except (*BROKEN, TypeError, KeyError, struct.error) as error:
        raise Failed(f"'{path}' is no picture that can be read", retry=False, asked=False) from error
    image.info.clear()
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
