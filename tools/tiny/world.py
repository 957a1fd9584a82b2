"""The emoji world: scenes of one to four sprites on a plain ground or in a place, and captions of them.

Every sprite lies on the 8-pixel grid of the network (two latent cells) and has one of two sizes, so that a template
repeats exactly under convolutions: with free positions the same network draws coloured blobs after the same time.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from texforce_cli.tiny.words import COLOURS, NOUNS, NUMBERS, PLACES, TINTED, article, held_out, plural

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
SIZE = 64
HORIZON = 40

_GLYPHS = dict(
    zip(
        NOUNS,
        "🐈 🐕 🐎 🐒 🐇 🦓 🕷 🐦 🐑 🐄 🦁 🐅 🐻 🦊 🐺 🐟 🐳 🦋 🐝 🐖 🐸 🐢 🐍 🦆 🐔 🦇 👨 👩 ✋ 🚗 🍎 ⛵".split(),
        strict=True,
    )
)
_TINTS = dict(
    zip(
        COLOURS,
        [
            (225, 35, 35),
            (245, 135, 25),
            (245, 215, 40),
            (45, 175, 60),
            (40, 95, 230),
            (145, 55, 200),
            (250, 125, 185),
            (38, 38, 42),
            (245, 245, 245),
        ],
        strict=True,
    )
)
KINDS = {"plain": 0.13, "color": 0.23, "count": 0.2, "composition": 0.15, "location": 0.19, "mixed": 0.1}
"""Kinds of scenes and their shares."""

TINTED_PAIRS = 0.15
"""Share of the pairs of two nouns whose sprites are tinted; without held-out colours a tenth is left."""

CORRUPTED = 0.25
"""Share of the captions given to `corrupt`, which finds something to change in six of seven: 22 % of all captions are wrong."""


@dataclass(frozen=True)
class Item:
    """One sprite: a noun, and a tint or its natural colours."""

    noun: str
    colour: str | None = None


@dataclass(frozen=True)
class Scene:
    """Sprites from left to right, and the place or None for a plain ground."""

    items: tuple[Item, ...]
    place: str | None = None

    @property
    def alike(self) -> bool:
        """Whether all sprites are the same: what a number is said of."""
        return len(set(self.items)) == 1

    @property
    def pairs_held_out(self) -> bool:
        """Whether a tint in it belongs to the held-out (noun, colour) pairs."""
        return any(item.colour is not None and held_out(item.noun, item.colour) for item in self.items)


# scenes ---------------------------------------------------------------------------------------------------------------


def draw_scene(
    rng: random.Random,
    kind: str | None = None,
    *,
    held: bool | None = False,
    shares: Mapping[str, float] = KINDS,
    tinted_pairs: float = TINTED_PAIRS,
) -> Scene:
    """A random scene of `kind` (by default of any, in their `shares`); `held`: with held-out pairs only (True), without
    any (False), or either (None)."""
    kind = kind or rng.choices(list(shares), list(shares.values()))[0]
    while True:
        scene = _any_scene(rng, kind, tinted_pairs)
        if held is None or scene.pairs_held_out == held:
            return scene


def _any_scene(rng: random.Random, kind: str, tinted_pairs: float) -> Scene:
    noun = rng.choice(TINTED if kind in ("color", "mixed") else NOUNS)
    if kind == "plain":
        return Scene((Item(noun),))
    if kind == "color":
        return Scene((Item(noun, rng.choice(COLOURS)),))
    if kind == "location":
        return Scene((Item(noun),), rng.choice(PLACES))
    if kind == "count":
        return Scene((Item(noun),) * rng.randint(2, 4), rng.choice(PLACES) if rng.random() < 0.25 else None)
    if kind == "composition":
        pair = rng.sample(NOUNS, 2)
        place = rng.choice(PLACES) if rng.random() < 0.2 else None
        tinted = rng.random() < tinted_pairs
        return Scene(tuple(Item(one, rng.choice(COLOURS) if tinted and one in TINTED else None) for one in pair), place)
    place = rng.choice(PLACES) if rng.random() < 0.6 else None
    copies = rng.randint(2, 4) if place is None or rng.random() < 0.3 else 1
    return Scene((Item(noun, rng.choice(COLOURS)),) * copies, place)


def changes(scene: Scene, rng: random.Random) -> dict[str, Scene]:
    """Scenes that differ from `scene` in one attribute each, by the attribute's name."""
    result = {}
    first, count = scene.items[0], len(scene.items)
    if scene.alike and first.colour:
        other = Item(first.noun, rng.choice([colour for colour in COLOURS if colour != first.colour]))
        result["color"] = replace(scene, items=(other,) * count)
    elif any(item.colour for item in scene.items):
        at = rng.choice([i for i, item in enumerate(scene.items) if item.colour])
        other = replace(scene.items[at], colour=rng.choice([c for c in COLOURS if c != scene.items[at].colour]))
        result["color"] = replace(scene, items=(*scene.items[:at], other, *scene.items[at + 1 :]))
    if scene.alike:
        copies = rng.choice([n for n in NUMBERS if n != count])
        result["count"] = replace(scene, items=(first,) * copies)
        pool = TINTED if first.colour else NOUNS
        noun = rng.choice([noun for noun in pool if noun != first.noun])
        result["object"] = replace(scene, items=(Item(noun, first.colour),) * count)
    else:
        at = rng.randrange(count)
        pool = TINTED if scene.items[at].colour else NOUNS
        noun = rng.choice([noun for noun in pool if noun not in {item.noun for item in scene.items}])
        other = replace(scene.items[at], noun=noun)
        result["composition"] = replace(scene, items=(*scene.items[:at], other, *scene.items[at + 1 :]))
    if scene.place:
        result["location"] = replace(scene, place=rng.choice([place for place in PLACES if place != scene.place]))
    return result


def _omissions(scene: Scene) -> list[Scene]:
    """Scenes in which one attribute of `scene` is not said."""
    result = []
    if any(item.colour for item in scene.items):
        result.append(replace(scene, items=tuple(Item(item.noun) for item in scene.items)))
    if scene.place:
        result.append(replace(scene, place=None))
    if len(scene.items) > 1:
        result.append(replace(scene, items=scene.items[:1]))
    return result


def corrupt(scene: Scene, rng: random.Random) -> Scene:
    """What a careless caption says of `scene`: one attribute (never a single object's noun) wrong, or left out in three
    of ten cases. It never names a held-out pair, lest the model be taught that such a pair is something else."""
    wrong = [other for name, other in changes(scene, rng).items() if name != "object" and not other.pairs_held_out]
    lost = _omissions(scene)
    if lost and (not wrong or rng.random() < 0.3):
        return rng.choice(lost)
    # a lone sprite without tint and place has only its number to be wrong about, which would drown the numbers
    if not wrong or (len(scene.items) == 1 and not lost):
        return scene
    if len(scene.items) == 1:
        wrong = [other for other in wrong if len(other.items) == 1] or wrong
    return rng.choice(wrong)


# captions -------------------------------------------------------------------------------------------------------------


def caption(scene: Scene, rng: random.Random | None = None) -> str:
    """`a green colored rabbit`, `four wolves in the forest`, `a cat and a dog`; with `rng` in varied wording ("colored",
    "a photo of", "a complete face of"), without it in the plainest."""
    first = scene.items[0]
    if len(scene.items) > 1 and scene.alike:
        text = f"{NUMBERS[len(scene.items)]} {f'{first.colour} ' if first.colour else ''}{plural(first.noun)}"
    else:
        text = " and ".join(article(_phrase(item, rng)) for item in scene.items)
        if rng and len(scene.items) == 1:
            if first.noun in ("man", "woman") and rng.random() < 0.5:
                text = f"a complete face of {text}"
            elif rng.random() < 0.25:
                text = f"a photo of {text}"
    return f"{text} {scene.place}" if scene.place else text


def _phrase(item: Item, rng: random.Random | None) -> str:
    if item.colour is None:
        return item.noun
    return f"{item.colour} colored {item.noun}" if rng and rng.random() < 0.4 else f"{item.colour} {item.noun}"


# pictures -------------------------------------------------------------------------------------------------------------


def render(scene: Scene, rng: random.Random) -> np.ndarray:
    """The picture, uint8 (64, 64, 3)."""
    picture = _ground(rng) if scene.place is None else _PLACE_PAINTERS[scene.place](rng)
    side = 48 if len(scene.items) == 1 else 30
    for item, corner in zip(scene.items, _corners(len(scene.items), rng, scene.place is not None), strict=True):
        sprite = _sprite(item, side)
        picture.paste(sprite, corner, sprite)
    return np.asarray(picture)


def _corners(count: int, rng: random.Random, in_place: bool) -> list[tuple[int, int]]:
    if count == 1:
        return [(8 * rng.randrange(3), 16 if in_place else 8)]
    if count == 2:
        y = 1 + 8 * rng.choice((1, 2, 3))
        return [(1, y), (33, y)]
    if count == 3:
        return [(1, 33), (33, 33), (17, 1)] if rng.random() < 0.5 else [(1, 1), (33, 1), (17, 33)]
    return [(1, 1), (33, 1), (1, 33), (33, 33)]


@functools.cache
def _sprite(item: Item, side: int) -> Image.Image:
    glyph = _glyph(item.noun)
    return (glyph if item.colour is None else _tinted(glyph, item.colour)).resize((side, side), Image.Resampling.BOX)


@functools.cache
def _glyph(noun: str) -> Image.Image:
    try:
        font = ImageFont.truetype(FONT, 109)
    except OSError as error:
        raise SystemExit(f"{FONT} is missing; install it: apt-get install fonts-noto-color-emoji") from error
    canvas = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
    ImageDraw.Draw(canvas).text((12, 12), _GLYPHS[noun], font=font, embedded_color=True)
    canvas = canvas.crop(canvas.getbbox())
    side = max(canvas.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(canvas, ((side - canvas.width) // 2, (side - canvas.height) // 2))
    return square.resize((240, 240), Image.Resampling.LANCZOS)


def _tinted(glyph: Image.Image, colour: str) -> Image.Image:
    pixels = np.asarray(glyph).astype(np.float32)
    light = pixels[..., :3] @ np.array([0.3, 0.59, 0.11], np.float32) / 255
    low, high = np.percentile(light[pixels[..., 3] > 128], [3, 97])
    light = np.clip((light - low) / (high - low + 1e-3), 0, 1)[..., None]
    tint = np.array(_TINTS[colour], np.float32)
    if colour == "white":
        pixels[..., :3] = 150 + 105 * light**0.6
    elif colour == "black":
        pixels[..., :3] = 12 + 75 * light
    else:
        pixels[..., :3] = np.where(light < 0.5, tint * (0.35 + 1.3 * light), tint + (255 - tint) * (light - 0.5) * 0.9)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8), "RGBA")


# grounds and places ---------------------------------------------------------------------------------------------------

Colour = tuple[int, int, int]


def _jitter(rng: random.Random, colour: Colour, by: float = 4) -> Colour:
    red, green, blue = (int(min(255, max(0, part + rng.uniform(-by, by)))) for part in colour)
    return red, green, blue


def _gradient(top: Colour, bottom: Colour, height: int) -> np.ndarray:
    t = np.linspace(0, 1, height)[:, None, None]
    return np.repeat((1 - t) * np.array(top) + t * np.array(bottom), SIZE, axis=1)


def _ground(rng: random.Random) -> Image.Image:
    grey = int(rng.uniform(200, 214))
    top = _jitter(rng, (grey, grey, grey), 3)
    bottom = (int(top[0] * 0.88), int(top[1] * 0.88), int(top[2] * 0.88))
    return Image.fromarray(_gradient(top, bottom, SIZE).astype(np.uint8))


def _halves(rng: random.Random, sky: tuple[Colour, Colour], land: tuple[Colour, Colour]) -> Image.Image:
    parts = [
        _gradient(_jitter(rng, sky[0]), _jitter(rng, sky[1]), HORIZON),
        _gradient(_jitter(rng, land[0]), _jitter(rng, land[1]), SIZE - HORIZON),
    ]
    return Image.fromarray(np.clip(np.concatenate(parts), 0, 255).astype(np.uint8))


def _moon(rng: random.Random) -> Image.Image:
    picture = _halves(rng, ((8, 8, 25), (20, 20, 45)), ((165, 165, 170), (125, 125, 130)))
    pen = ImageDraw.Draw(picture)
    for _ in range(14):
        pen.point((rng.randrange(SIZE), rng.randrange(HORIZON - 2)), fill=(255, 255, 240))
    for _ in range(4):
        x, y, w = rng.randrange(SIZE), rng.randrange(HORIZON + 4, SIZE), rng.randrange(4, 9)
        pen.ellipse((x - w, y - w // 3, x + w, y + w // 3), fill=(100, 100, 106))
    pen.ellipse((4, 4, 16, 16), fill=(60, 120, 220))
    pen.ellipse((6, 6, 11, 11), fill=(70, 170, 90))
    return picture


def _forest(rng: random.Random) -> Image.Image:
    picture = _halves(rng, ((150, 200, 160), (120, 180, 130)), ((70, 125, 50), (50, 95, 40)))
    pen = ImageDraw.Draw(picture)
    for column in range(4, 66, 12):
        x, top = column + rng.randrange(-2, 3), rng.randrange(4, 14)
        pen.rectangle((x - 1, HORIZON - 8, x + 1, HORIZON + 4), fill=(95, 60, 30))
        green = _jitter(rng, (25, 95, 40), 12)
        for storey in range(3):
            y, w = top + storey * 7, 5 + storey * 2
            pen.polygon([(x, y - 2), (x - w, y + 11), (x + w, y + 11)], fill=green)
    return picture


def _beach(rng: random.Random) -> Image.Image:
    picture = _halves(rng, ((120, 195, 245), (190, 230, 250)), ((240, 215, 150), (225, 190, 120)))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((0, HORIZON - 12, SIZE, HORIZON), fill=_jitter(rng, (30, 120, 190)))
    pen.line((0, HORIZON, SIZE, HORIZON), fill=(245, 250, 255))
    pen.ellipse((3, 3, 15, 15), fill=(255, 225, 70))
    return picture


def _snow(rng: random.Random) -> Image.Image:
    picture = _halves(rng, ((165, 195, 225), (205, 222, 240)), ((250, 252, 255), (225, 235, 248)))
    pen = ImageDraw.Draw(picture)
    for _ in range(26):
        x, y = rng.randrange(SIZE), rng.randrange(SIZE)
        pen.ellipse((x, y, x + 1, y + 1), fill=(255, 255, 255))
    return picture


def _desert(rng: random.Random) -> Image.Image:
    picture = _halves(rng, ((250, 190, 110), (255, 225, 160)), ((225, 160, 70), (195, 125, 50)))
    pen = ImageDraw.Draw(picture)
    pen.polygon([(-5, HORIZON + 2), (17, HORIZON - 9), (43, HORIZON + 2)], fill=(215, 145, 60))
    cactus = (50, 130, 60)
    pen.rectangle((54, HORIZON - 18, 58, HORIZON + 6), fill=cactus)
    pen.rectangle((50, HORIZON - 12, 62, HORIZON - 9), fill=cactus)
    pen.rectangle((50, HORIZON - 15, 52, HORIZON - 10), fill=cactus)
    pen.rectangle((60, HORIZON - 15, 62, HORIZON - 10), fill=cactus)
    return picture


def _city(rng: random.Random) -> Image.Image:
    picture = _halves(rng, ((170, 190, 215), (215, 220, 230)), ((95, 95, 100), (75, 75, 80)))
    pen = ImageDraw.Draw(picture)
    left = 0
    while left < SIZE:
        width, top = rng.randrange(9, 14), rng.randrange(4, 24)
        pen.rectangle((left, top, left + width - 2, HORIZON), fill=_jitter(rng, (95, 100, 125), 16))
        for y in range(top + 2, HORIZON - 2, 4):
            for x in range(left + 1, left + width - 3, 3):
                pen.point((x, y), fill=(255, 235, 140))
        left += width
    for x in range(2, SIZE, 14):
        pen.rectangle((x, 55, x + 6, 56), fill=(240, 240, 240))
    return picture


def _ocean(rng: random.Random) -> Image.Image:
    top, bottom = _jitter(rng, (40, 150, 215)), _jitter(rng, (8, 50, 125))
    picture = Image.fromarray(_gradient(top, bottom, SIZE).astype(np.uint8))
    pen = ImageDraw.Draw(picture)
    for _ in range(9):
        x, y, w = rng.randrange(SIZE), rng.randrange(SIZE), rng.randrange(1, 4)
        pen.ellipse((x - w, y - w, x + w, y + w), outline=(170, 225, 250))
    for x in range(3, SIZE, 9):
        height = rng.randrange(6, 14)
        pen.line((x, SIZE, x + rng.randrange(-2, 3), SIZE - height), fill=(30, 140, 90), width=2)
    return picture


def _park(rng: random.Random) -> Image.Image:
    picture = _halves(rng, ((120, 190, 250), (185, 225, 250)), ((110, 200, 80), (80, 165, 60)))
    pen = ImageDraw.Draw(picture)
    pen.rectangle((8, HORIZON - 12, 11, HORIZON + 3), fill=(110, 70, 35))
    pen.ellipse((-1, HORIZON - 28, 20, HORIZON - 8), fill=_jitter(rng, (50, 150, 55)))
    pen.ellipse((45, 6, 55, 12), fill=(255, 255, 255))
    pen.ellipse((50, 4, 61, 12), fill=(255, 255, 255))
    for _ in range(7):
        spot = rng.randrange(SIZE), rng.randrange(HORIZON + 3, SIZE)
        pen.point(spot, fill=rng.choice([(255, 80, 120), (255, 240, 90)]))
    return picture


def _night(rng: random.Random) -> Image.Image:
    picture = _halves(rng, ((12, 14, 50), (35, 38, 90)), ((22, 45, 40), (12, 28, 28)))
    pen = ImageDraw.Draw(picture)
    for _ in range(10):
        pen.point((rng.randrange(SIZE), rng.randrange(HORIZON)), fill=(255, 255, 220))
    pen.ellipse((4, 4, 18, 18), fill=(250, 240, 190))
    pen.ellipse((8, 3, 20, 16), fill=(14, 16, 54))
    return picture


_PLACE_PAINTERS: dict[str, Callable[[random.Random], Image.Image]] = dict(
    zip(PLACES, [_moon, _forest, _beach, _snow, _desert, _city, _ocean, _park, _night], strict=True)
)
