"""Pictures read as pixels, and grids of them with captions, drawn with Pillow."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont, PngImagePlugin

from texforce_cli.errors import TexforceError
from texforce_cli.files import atomic_path

_GAP = 6
_INK, _FAINT, _PAPER = (28, 28, 30), (110, 110, 116), (255, 255, 255)
_SMALLEST = 128
"""Pictures of fewer pixels are enlarged, pixel by pixel, to be seen."""
_TEXT_CHUNK = 8_000
_LARGEST_SIDE = 16_384
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)
"""What Pillow raises for a file that is no picture, or no whole one."""


def save_png(path: Path, picture: Image.Image, texts: Mapping[str, str]) -> None:
    """Write a PNG with `texts` in its text chunks, as one atomic step."""
    chunks = PngImagePlugin.PngInfo()
    for key, value in texts.items():
        chunks.add_itxt(key, value[:_TEXT_CHUNK])
    with atomic_path(path, settled=False) as temporary:
        picture.save(temporary, "PNG", pnginfo=chunks)


def flattened(picture: Image.Image) -> Image.Image:
    """As RGB: what is transparent is white, palettes and grey have three channels, 16 bits of grey become 8."""
    if picture.mode.startswith("I"):  # I;16, or I before Pillow 10.3; Pillow would make all of it white
        return Image.fromarray(np.clip(np.asarray(picture) >> 8, 0, 255).astype(np.uint8)).convert("RGB")
    if "A" not in picture.getbands() and "transparency" not in picture.info:
        return picture.convert("RGB")
    ground = Image.new("RGBA", picture.size, "white")
    return Image.alpha_composite(ground, picture.convert("RGBA")).convert("RGB")


def read_picture(path: Path) -> NDArray[np.uint8]:
    """uint8 [height, width, 3]; transparency on white, palettes and grey as RGB.

    Raises:
        TexforceError: missing, truncated, or no picture.
    """
    try:
        with Image.open(path) as opened:
            if max(opened.size) > _LARGEST_SIDE:
                raise TexforceError(f"'{path.name}' has {opened.width} x {opened.height} pixels", "it is too large")
            opened.load()
            return np.asarray(flattened(opened))
    except FileNotFoundError as error:
        raise TexforceError(f"'{path.name}' is missing") from error
    except BROKEN as error:
        raise TexforceError(f"'{path.name}' is no whole picture ({str(error)[:80]})") from error


@dataclass(frozen=True)
class _Line:
    """One line of pictures: what stands left of it and below each of its pictures."""

    pictures: Sequence[Image.Image]
    label: str = ""
    captions: Sequence[str] = ()


def picture_grid(
    rows: Sequence[Sequence[Image.Image]], *, captions: Sequence[str], headers: Sequence[str] = (), title: str = ""
) -> Image.Image:
    """Rows of pictures, the caption of each row left of it, the headers above the columns."""
    lines = [_Line(pictures, label) for pictures, label in zip(rows, captions)]
    return _compose(lines, title, headers)


def before_after(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    prompts: Sequence[str],
    *,
    before_label: str,
    after_label: str,
    title: str,
    columns: int = 8,
) -> Image.Image:
    """Pairs of pictures, `columns` a line: the first of each pair above the second, the prompt below both."""
    lines = []
    for start in range(0, len(prompts), columns):
        part = slice(start, start + columns)
        lines.append(_Line(before[part], before_label))
        lines.append(_Line(after[part], after_label, prompts[part]))
    return _compose(lines, title, ())


def _compose(lines: Sequence[_Line], title: str, headers: Sequence[str]) -> Image.Image:
    scale = _scale(lines)
    size = max((max(p.size) for line in lines for p in line.pictures), default=_SMALLEST) * scale
    columns = max((len(line.pictures) for line in lines), default=1)
    text = max(12, size // 10)
    font, small = ImageFont.load_default(text), ImageFont.load_default(max(11, round(text * 0.9)))
    left = _width([line.label for line in lines], font, size)
    top = _GAP + (round(text * 1.9) if title else 0) + (round(text * 1.5) if headers else 0)
    wrapped = [[_wrap(caption, small, size) for caption in line.captions] for line in lines]
    heights = [
        size + _GAP + max((t.count("\n") + 1 for t in texts), default=0) * round(text * 1.2) for texts in wrapped
    ]
    width = left + columns * (size + _GAP) + _GAP
    canvas = Image.new("RGB", (width, top + sum(heights) + _GAP), _PAPER)
    draw = ImageDraw.Draw(canvas)
    if title:
        draw.text((_GAP, _GAP), _drawable(title), _INK, ImageFont.load_default(round(text * 1.2)))
    for column, header in enumerate(headers):
        draw.text((left + column * (size + _GAP), top - round(text * 1.5)), _drawable(header), _FAINT, small)
    y = top
    for line, texts, height in zip(lines, wrapped, heights):
        draw.multiline_text((_GAP, y + 2), _wrap(line.label, font, left - 2 * _GAP), _INK, font)
        for column, picture in enumerate(line.pictures):
            enlarged = picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)
            canvas.paste(enlarged, (left + column * (size + _GAP), y))
        for column, caption in enumerate(texts):
            draw.multiline_text((left + column * (size + _GAP), y + size + 2), caption, _FAINT, small)
        y += height
    return canvas


def _scale(lines: Sequence[_Line]) -> int:
    smallest = min((min(p.size) for line in lines for p in line.pictures), default=_SMALLEST)
    return max(1, -(-_SMALLEST // smallest))


def _width(labels: Sequence[str], font: ImageFont.FreeTypeFont | ImageFont.ImageFont, limit: int) -> int:
    longest = max((font.getlength(_drawable(label)) for label in labels), default=0)
    return math.ceil(min(longest, limit)) + 2 * _GAP if longest else _GAP


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """At most four lines that fit into `width` pixels."""
    line = _drawable(text)
    if font.getlength(line) <= width:
        return line
    letters = max(4, int(width / max(1.0, font.getlength("n"))))
    return "\n".join(textwrap.wrap(line, letters, max_lines=4, placeholder="…"))


def _drawable(text: str) -> str:
    """One line of printable characters: prompts may hold anything."""
    return "".join(c if c.isprintable() else " " for c in text)[:400]
