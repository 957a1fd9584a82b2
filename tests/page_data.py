"""An evaluation that never happened, for the tests of its page: drawn scenes, scores with strong prompt effects.

`python tests/page_data.py FOLDER` writes the page, to look at it.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image, ImageDraw, ImageFilter

from texforce_cli.report.page import Page, PageMetric, PagePrompt, PageVariant, Picture, Row, write_page

COLOURS = {
    "red": (206, 62, 52), "orange": (232, 134, 44), "yellow": (240, 200, 60), "green": (74, 150, 84),
    "blue": (62, 110, 190), "purple": (128, 84, 170), "white": (240, 240, 236), "black": (48, 46, 52),
}  # fmt: skip
THINGS = ("fox", "house", "balloon", "sailing boat", "tree", "car")
PLACES = {
    "in the snow": ((196, 214, 232), (238, 243, 248)), "at sunset": ((244, 166, 110), (150, 104, 96)),
    "by the sea": ((164, 206, 232), (64, 128, 168)), "in the desert": ((238, 214, 176), (214, 170, 110)),
    "at night": ((30, 38, 72), (34, 50, 52)), "in a meadow": ((178, 214, 240), (120, 172, 96)),
}  # fmt: skip
HOSTILE = (
    "</script><script>document.title = 'broken'</script><!-- <script> ]]> &amp; \"'`",
    "<img src=x onerror=\"document.title = 'broken'\"> a cat",
    "a \u202erevoked tac\u202c and \u2067isolates\u2069, שלום עולם, مرحبا",
    "x" * 2000,
    "many words " * 181 + "to the end",
    "controls \x00\x01\x07\x1b[31m\x7f\x85 tab\there\r\nnew line\u2028separator \ud800 surrogate",
    "{{ 7 * 7 }} {% raw %} ${alert(1)} =cmd|' /C calc'!A0",
    "z\u0300\u0301\u0302\u0303\u0304\u0305\u0306\u0307\u0308\u0309" * 20,
    "",
)
VARIANTS = (
    PageVariant("base", "The embedded model as it is.", frozenset()),
    PageVariant("texforce", "LoRA in the text encoder, trained on tiny-clip.", frozenset({"tiny-clip"})),
    PageVariant("ddpo", "LoRA in the U-Net, trained on tiny-clip.", frozenset({"tiny-clip"})),
    PageVariant("texforce + ddpo", "Both LoRAs at weight 0.8, never trained together.", frozenset({"tiny-clip"})),
)
METRICS = (
    PageMetric("tiny-clip", "", True, "How well the picture shows the words, by a model that learned both."),
    PageMetric("tiny-judge", "points", True, "What a judge that nobody trained on thinks of it."),
    PageMetric("jpeg-incompressibility", "kB", False, "Size as JPEG: more detail, or more noise."),
)
SHIFTS = {"base": 0.0, "texforce": 0.55, "ddpo": 0.35, "texforce + ddpo": 0.8}


def example_prompts(count: int) -> list[PagePrompt]:
    """`count` prompts like "a red fox in the snow", each third unseen, the category its place."""
    every = list(itertools.product(THINGS, PLACES, COLOURS))
    random.Random(5).shuffle(every)
    prompts = []
    for number in range(count):
        thing, place, colour = every[number % len(every)]
        text = f"{'an' if colour[0] == 'o' else 'a'} {colour} {thing} {place}" + (
            f", take {number // len(every) + 1}" if number >= len(every) else ""
        )
        prompts.append(
            PagePrompt(f"p{number:03d}", text, "unseen" if number % 3 == 2 else "seen", (place,) if place else ())
        )
    return prompts


def hostile_prompts() -> list[PagePrompt]:
    """Prompts that attack the page, under ids and categories that do so too."""
    return [PagePrompt(text[:60], text, "seen" if n % 2 else "unseen", (text[:40],)) for n, text in enumerate(HOSTILE)]


def draw(prompt: PagePrompt, seed: int, strength: float, size: int) -> Image.Image:
    """A scene; with more `strength` its colours are purer and it has more in it."""
    chance = random.Random(repr((prompt.id, seed)))
    colour = next((value for name, value in COLOURS.items() if f" {name} " in f" {prompt.text} "), (120, 120, 130))
    sky, ground = next((v for name, v in PLACES.items() if name in prompt.text), ((200, 206, 214), (150, 150, 150)))
    pale = 0.45 * (1 - strength)
    paled = tuple(round(c * (1 - pale) + 150 * pale) for c in colour)
    big = size * 2
    picture = Image.new("RGB", (big, big), sky)
    pen = ImageDraw.Draw(picture)
    horizon = big * chance.uniform(0.5, 0.66)
    for line in range(int(horizon)):
        pen.line([(0, line), (big, line)], tuple(round(c + (255 - c) * 0.45 * line / horizon) for c in sky))
    x, y, r = big * chance.uniform(0.15, 0.85), big * chance.uniform(0.12, 0.3), big * chance.uniform(0.05, 0.09)
    pen.ellipse((x - r, y - r, x + r, y + r), (252, 240, 200))
    for layer in range(3):
        tone = tuple(round(c * (0.78 + 0.11 * layer)) for c in ground)
        lift, phase, pace = (0.07 - 0.04 * layer) * big, chance.uniform(0, 6), chance.uniform(1.2, 2.6)
        ridge = [
            (float(at), horizon - lift + (0.09 * layer + 0.03 * math.sin(phase + pace * 3 * at / big)) * big)
            for at in range(0, big + 8, 8)
        ]
        pen.polygon([*ridge, (big, big), (0, big)], tone)
    spot = (big * chance.uniform(0.35, 0.65), horizon + big * chance.uniform(0.1, 0.16))
    _thing(pen, prompt.text, *spot, big * chance.uniform(0.15, 0.2), paled)
    for _ in range(round(14 * strength)):
        x, y, r = chance.uniform(0, big), chance.uniform(horizon + 0.1 * big, big), big * chance.uniform(0.006, 0.014)
        pen.ellipse((x - r, y - r, x + r, y + r), tuple(min(255, c + 40) for c in ground))
    blurred = picture.filter(ImageFilter.GaussianBlur(big * 0.012 * (1 - strength)))
    return blurred.resize((size, size), Image.Resampling.LANCZOS)


def _thing(pen: ImageDraw.ImageDraw, text: str, x: float, y: float, s: float, colour: tuple[int, ...]) -> None:
    dark = tuple(round(c * 0.62) for c in colour)
    pen.ellipse((x - s, y + 0.72 * s, x + s, y + 0.95 * s), tuple(round(c * 0.3) + 40 for c in colour))
    if "house" in text:
        pen.rectangle((x - 0.8 * s, y - 0.4 * s, x + 0.8 * s, y + 0.85 * s), colour)
        pen.polygon([(x - s, y - 0.4 * s), (x, y - 1.2 * s), (x + s, y - 0.4 * s)], dark)
        pen.rectangle((x - 0.18 * s, y + 0.2 * s, x + 0.18 * s, y + 0.85 * s), dark)
    elif "balloon" in text:
        pen.ellipse((x - 0.9 * s, y - 2.2 * s, x + 0.9 * s, y - 0.4 * s), colour)
        pen.ellipse((x - 0.35 * s, y - 2.2 * s, x + 0.35 * s, y - 0.4 * s), dark)
        pen.rectangle((x - 0.2 * s, y, x + 0.2 * s, y + 0.3 * s), (120, 88, 60))
    elif "boat" in text:
        pen.polygon(
            [(x - s, y + 0.4 * s), (x + s, y + 0.4 * s), (x + 0.6 * s, y + 0.85 * s), (x - 0.6 * s, y + 0.85 * s)], dark
        )
        pen.polygon([(x, y - 1.4 * s), (x + 0.9 * s, y + 0.25 * s), (x, y + 0.25 * s)], colour)
    elif "tree" in text:
        pen.rectangle((x - 0.12 * s, y, x + 0.12 * s, y + 0.85 * s), (110, 78, 54))
        for dx, dy in ((-0.4, -0.5), (0.4, -0.5), (0, -1.0), (0, -0.3)):
            pen.ellipse((x + (dx - 0.55) * s, y + (dy - 0.5) * s, x + (dx + 0.55) * s, y + (dy + 0.5) * s), colour)
    elif "car" in text:
        pen.rounded_rectangle((x - 1.1 * s, y, x + 1.1 * s, y + 0.65 * s), 0.2 * s, colour)
        pen.rounded_rectangle((x - 0.6 * s, y - 0.45 * s, x + 0.6 * s, y + 0.2 * s), 0.2 * s, dark)
        for dx in (-0.6, 0.6):
            pen.ellipse((x + (dx - 0.24) * s, y + 0.45 * s, x + (dx + 0.24) * s, y + 0.93 * s), (40, 40, 44))
    else:
        pen.ellipse((x - 0.9 * s, y - 0.1 * s, x + 0.6 * s, y + 0.85 * s), colour)
        pen.ellipse((x + 0.25 * s, y - 0.75 * s, x + 1.05 * s, y + 0.1 * s), colour)
        for dx in (0.3, 0.72):
            pen.polygon(
                [(x + dx * s, y - 0.6 * s), (x + (dx + 0.3) * s, y - 0.6 * s), (x + (dx + 0.15) * s, y - 1.15 * s)],
                dark,
            )
        pen.polygon([(x - 0.7 * s, y + 0.5 * s), (x - 1.6 * s, y - 0.1 * s), (x - 1.2 * s, y + 0.75 * s)], dark)


def scores_of(prompt: PagePrompt, seed: int, variant: str) -> dict[str, float]:
    """Scores in which the prompt matters more than the variant, and a gain that unseen prompts share in part."""
    shared, own = random.Random(repr(prompt.id)), random.Random(repr((prompt.id, seed, variant)))
    difficulty, shift = shared.gauss(0, 1), SHIFTS.get(variant, 0.0) * (0.6 if prompt.split == "unseen" else 1)
    return {
        "tiny-clip": 0.26 + 0.03 * (difficulty + shift + own.gauss(0, 0.4)),
        "tiny-judge": 5 + 0.9 * (difficulty + 0.5 * shift + own.gauss(0, 0.7)),
        "jpeg-incompressibility": 21 + 3 * (shared.gauss(0, 1) + 0.25 * shift + own.gauss(0, 0.5)),
    }


def example_page(
    folder: Path,
    *,
    prompts: Sequence[PagePrompt] | int = 12,
    seeds: Sequence[int] = (0, 1),
    size: int = 96,
    variants: Sequence[PageVariant] = VARIANTS,
    gaps: int = 0,
    title: str = "Colours, things and places",
) -> Page:
    """A page whose pictures lie in `folder`; the last `gaps` pictures of the last variant are missing."""
    asked = example_prompts(prompts) if isinstance(prompts, int) else list(prompts)
    keys = [(v.name, p.id, s) for v in variants for p in asked for s in seeds]
    texts = {prompt.id: prompt for prompt in asked}
    pictures = {}
    folder.mkdir(parents=True, exist_ok=True)
    for number, (variant, identity, seed) in enumerate(keys[: len(keys) - gaps]):
        path = folder / f"{number}.png"
        strength = min(1.0, 0.15 + SHIFTS.get(variant, 0.4))
        draw(texts[identity], seed, strength, size).save(path, compress_level=1)
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        pictures[variant, identity, seed] = Picture(path, digest, scores_of(texts[identity], seed, variant))
    names = [variant.name for variant in variants]
    missing = [
        f"{variant}: no picture of {identity}, seed {seed}" for variant, identity, seed in keys[len(keys) - gaps :]
    ]
    means = _prompt_means(asked, seeds, pictures)
    rows = [
        _row(group, name, m, asked, means, names[0], len(seeds))
        for group in _groups(asked)
        for name in names
        for m in METRICS
    ]
    wins = {
        metric.name: {a: {b: _wins(means, metric, a, b) for b in names if b != a} for a in names} for metric in METRICS
    }
    return Page(title, names[0], variants, METRICS, asked, seeds, pictures, rows, wins, missing)


Means = dict[tuple[str, str, str], float]


def _prompt_means(
    prompts: Sequence[PagePrompt], seeds: Sequence[int], pictures: dict[tuple[str, str, int], Picture]
) -> Means:
    means: Means = {}
    for variant in {key[0] for key in pictures}:
        for prompt, metric in itertools.product(prompts, METRICS):
            found = [pictures[variant, prompt.id, s].scores for s in seeds if (variant, prompt.id, s) in pictures]
            if found:
                means[variant, prompt.id, metric.name] = statistics.mean(scores[metric.name] for scores in found)
    return means


def _groups(prompts: Sequence[PagePrompt]) -> list[str]:
    return [
        "all",
        *dict.fromkeys(p.split for p in prompts if p.split),
        *dict.fromkeys(c for p in prompts for c in p.categories),
    ]


def _wins(means: Means, metric: PageMetric, a: str, b: str) -> float:
    sign = 1 if metric.higher_is_better else -1
    pairs = [
        (value, means[b, p, m])
        for (v, p, m), value in means.items()
        if v == a and m == metric.name and (b, p, m) in means
    ]
    return sum(0.5 if x == y else float(sign * (x - y) > 0) for x, y in pairs) / len(pairs) if pairs else 0.5


def _row(
    group: str, variant: str, metric: PageMetric, prompts: Sequence[PagePrompt], means: Means, baseline: str, seeds: int
) -> Row:
    """Normal intervals: good enough to look at."""
    members = [p.id for p in prompts if group in ("all", p.split, *p.categories)]
    own = [means[variant, p, metric.name] for p in members if (variant, p, metric.name) in means]
    both = [p for p in members if (variant, p, metric.name) in means and (baseline, p, metric.name) in means]
    gains = [means[variant, p, metric.name] - means[baseline, p, metric.name] for p in both]
    mean, low, high = _interval(own)
    row = Row(
        group=group, variant=variant, metric=metric.name, mean=mean, low=low, high=high,
        label="for this prompt only" if len(members) == 1 else "", prompts=len(own), pictures=seeds * len(own),
    )  # fmt: skip
    if variant == baseline or not gains:
        return row
    difference, below, above = _interval(gains)
    rate = sum((g > 0) == metric.higher_is_better for g in gains) / len(gains)
    row = replace(row, difference=difference, difference_low=below, difference_high=above, win_rate=rate)
    if len(gains) == 1:
        return row
    middle, error = statistics.mean(gains), statistics.stdev(gains) / math.sqrt(len(gains))
    p = math.erfc(abs(middle) / error / math.sqrt(2))
    effect = middle / statistics.stdev(gains)
    return replace(row, p=p, p_holm=min(1.0, 9 * p), effect=effect, detectable=2.8 * error)


def _interval(values: Sequence[float]) -> tuple[float | None, float | None, float | None]:
    if len(values) < 2:
        return (values[0] if values else None), None, None
    middle, half = statistics.mean(values), 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    return middle, middle - half, middle + half


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompts", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--single-file", action="store_true")
    given = parser.parse_args()
    made = example_page(given.folder / "drawn", prompts=given.prompts, seeds=range(given.seeds), size=given.size)
    print(write_page(made, given.folder, single_file=given.single_file))
