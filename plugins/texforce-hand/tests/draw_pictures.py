"""Draws the strips of test pictures in pictures/ from Noto Color Emoji (`apt-get install fonts-noto-color-emoji`).

python draw_pictures.py [FONT.ttf]; needs Pillow and NumPy
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
FOLDER = Path(__file__).parent / "pictures"
SIDE = 256
GLYPH = 90
"""Its width in the picture; the palm detector is made for hands that fill a third of it or less."""

HANDS = "🤚🏽 ✋🏽 🖐🏽 👋🏽".split()
WITHOUT = "🐈 🐕 🚗 🍎 ⛵ 🏠 🐢 🌲".split()


def draw(character: str, font: ImageFont.FreeTypeFont) -> Image.Image:
    """The emoji in the middle of a white picture."""
    glyph = Image.new("RGBA", (136, 128))
    ImageDraw.Draw(glyph).text((0, 0), character, font=font, embedded_color=True)
    glyph = glyph.resize((GLYPH, round(GLYPH * 128 / 136)), Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (SIDE, SIDE), "white")
    picture.paste(glyph, ((SIDE - glyph.width) // 2, (SIDE - glyph.height) // 2), glyph)
    return picture


def _box(pixels: NDArray[np.uint8]) -> tuple[slice, slice]:
    rows, columns = np.nonzero((pixels < 245).any(-1))
    return slice(rows.min(), rows.max() + 1), slice(columns.min(), columns.max() + 1)


def shuffled(picture: Image.Image) -> Image.Image:
    """The upper half, where the fingers are, cut into five upright strips in another order."""
    pixels = np.array(picture)
    box = _box(pixels)
    fingers = pixels[box][: (box[0].stop - box[0].start) // 2]
    strips = np.array_split(fingers.copy(), 5, axis=1)
    fingers[:] = np.concatenate([strips[i] for i in (3, 0, 4, 1, 2)], axis=1)
    return Image.fromarray(pixels)


def cut(picture: Image.Image) -> Image.Image:
    """Without the upper half, where the fingers are."""
    pixels = np.array(picture)
    box = _box(pixels)
    pixels[box][: (box[0].stop - box[0].start) // 2] = 255
    return Image.fromarray(pixels)


def blurred(picture: Image.Image) -> Image.Image:
    """Blurred until the fingers run together."""
    return picture.filter(ImageFilter.GaussianBlur(8))


def main() -> None:
    """Write the strips."""
    font = ImageFont.truetype(sys.argv[1] if len(sys.argv) > 1 else FONT, 109)
    hands = [draw(character, font) for character in HANDS]
    strips = {
        "hand": hands,
        "shuffled": [shuffled(hand) for hand in hands],
        "cut": [cut(hand) for hand in hands],
        "blurred": [blurred(hand) for hand in hands],
        "without": [draw(character, font) for character in WITHOUT],
    }
    FOLDER.mkdir(exist_ok=True)
    for name, pictures in strips.items():
        strip = np.concatenate([np.array(picture) for picture in pictures], axis=1)
        Image.fromarray(strip).save(FOLDER / f"{name}.png", optimize=True)


if __name__ == "__main__":
    main()
