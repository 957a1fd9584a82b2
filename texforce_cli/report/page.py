"""The page of an evaluation: HTML that shows the same prompts and seeds drawn by several variants, beside the statistics.

It opens from the disk, asks nothing of the network and says the same thing each time: the same input gives the same
bytes. Everything that users wrote is shown as text.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import io
import json
import math
import re
import statistics
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, Template
from markupsafe import Markup
from PIL import Image

from texforce_cli.errors import TexforceError
from texforce_cli.files import write_bytes, write_text
from texforce_cli.report.pictures import BROKEN, flattened
from texforce_cli.threads import ahead

_TEMPLATES = Path(__file__).parent / "templates"
_SCRIPTS = ("data", "tabs", "summary", "plots", "pictures", "gains", "grid", "zoom", "blind", "start")
_RECIPE = "webp 1"
"""Part of the names in media/: change it with the sizes and qualities below, and old files are not taken for new ones."""
_PIXELS, _THUMBNAIL, _LARGEST, _LARGEST_INLINE = 128, 320, 2048, 768
_JS_INTEGERS = 2**53
"""From here on numbers of JavaScript skip some: a vote would name another seed."""
_BIDI = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
_MEDIA_NAME = re.compile(r"[0-9a-f]{24}\.webp|\.[0-9a-f]{24}\.[0-9a-f]{8}\.tmp\.webp")
_GROUPS = {"all": "all prompts", "seen": "seen prompts", "unseen": "unseen prompts"}


@dataclass(frozen=True)
class Picture:
    """One PNG, the SHA-256 of its bytes, and its score by metric."""

    path: Path
    sha256: str
    scores: Mapping[str, float]


@dataclass(frozen=True)
class PagePrompt:
    """A prompt: `split` is "seen", "unseen" or ""."""

    id: str
    text: str
    split: str
    categories: tuple[str, ...] = ()


@dataclass(frozen=True)
class PageVariant:
    """A model that drew pictures, and the names of the metrics that it was trained on."""

    name: str
    description: str
    in_sample: frozenset[str]


@dataclass(frozen=True)
class PageMetric:
    """What pictures are scored by; `summary` is a sentence for people."""

    name: str
    unit: str
    higher_is_better: bool
    summary: str


@dataclass(frozen=True, kw_only=True)
class Row:
    """One variant by one metric on one group of prompts ("all", "seen", "unseen" or a category).

    The intervals are 95 %. `difference` and what follows compare to the baseline: None for the baseline itself, and
    where there is nothing to compare. `detectable` is the smallest difference that so many prompts can show.
    """

    group: str
    variant: str
    metric: str
    mean: float | None
    low: float | None
    high: float | None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    label: str
    win_rate: float | None = None
    p: float | None = None
    p_holm: float | None = None
    effect: float | None = None
    detectable: float | None = None
    prompts: int
    pictures: int


@dataclass(frozen=True)
class Tab:
    """One more section. `html_safe` goes into the page as it is; scripts and styles in it are blocked by the page. A function
    is called with the addresses of the pictures' thumbnails, by their SHA-256."""

    id: str
    title: str
    html_safe: str | Callable[[Mapping[str, str]], str]


@dataclass(frozen=True)
class Page:
    """All that the page shows.

    `pictures` is keyed by variant, prompt id and seed; a key that is absent is shown as a gap. `wins[metric][a][b]` is
    the share of pictures in which `a` beats `b`, ties counted half, prompts equally. `missing` says in sentences what could not be made,
    `left_out` how much therefore counts nowhere: what has no score in one variant is compared in none.
    """

    title: str
    baseline: str
    variants: Sequence[PageVariant]
    metrics: Sequence[PageMetric]
    prompts: Sequence[PagePrompt]
    seeds: Sequence[int]
    pictures: Mapping[tuple[str, str, int], Picture]
    rows: Sequence[Row]
    wins: Mapping[str, Mapping[str, Mapping[str, float]]]
    missing: Sequence[str]
    extra_tabs: Sequence[Tab] = ()
    left_out: Sequence[str] = ()


def write_page(
    page: Page,
    folder: Path,
    *,
    single_file: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Path:
    """Write folder/index.html and return its path.

    The pictures lie as WebP in folder/media/, named by what they show, so that a second page draws on them; files in
    there that no picture needs any more are removed. With `single_file` they are in the page itself, at most 768 pixels
    wide. `progress` is told how many pictures are done, of how many.

    Raises:
        TexforceError: a picture cannot be read, or the folder cannot be written.
    """
    _check(page)
    media = _media(page, folder / "media", single_file, progress)
    path = folder / "index.html"
    write_text(path, _html(page, media, single_file))
    # only now does no page on the disk point to them
    needed = set() if single_file else {name for m in media.values() for name in (m.large, m.thumbnail)}
    _prune(folder / "media", needed)
    return path


def pictures_hash(page: Page) -> str:
    """What rankings, and votes that name no pictures, belong to: SHA-256 over variants, prompts, seeds and pictures.

    Neither scores nor the order of anything are in it: they stay valid when a metric is added.
    """
    votable = {
        "variants": sorted(variant.name for variant in page.variants),
        "prompts": sorted([prompt.id, prompt.text] for prompt in page.prompts),
        "pictures": sorted([*key, picture.sha256] for key, picture in page.pictures.items()),
    }
    return hashlib.sha256(json.dumps(votable).encode("ascii")).hexdigest()


def _check(page: Page) -> None:
    """What would make a page that contradicts itself is a bug of the caller."""
    names = [variant.name for variant in page.variants]
    tabs = [tab.id for tab in page.extra_tabs]
    for kind, keys in (
        ("variant", names),
        ("prompt", [prompt.id for prompt in page.prompts]),
        ("metric", [metric.name for metric in page.metrics]),
        ("seed", list(page.seeds)),
        ("tab", tabs),
    ):
        if len(set(keys)) != len(keys):
            raise ValueError(f"a {kind} is there twice: {keys}")
    if page.baseline not in names:
        raise ValueError(f"the baseline {page.baseline!r} is none of {names}")
    if bad := [tab for tab in tabs if not re.fullmatch("[a-z][a-z0-9-]*", tab)]:
        raise ValueError(f"the id of a tab is small letters, digits and hyphens: {bad}")


# --- pictures ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Media:
    """A picture's file names, or data: URLs, and its own width and height."""

    large: str
    thumbnail: str
    width: int
    height: int


def _media(page: Page, folder: Path, single_file: bool, progress: Callable[[int, int], None]) -> dict[str, _Media]:
    """The media of each different picture, by its SHA-256, in the order of the page."""
    keys = [(v.name, p.id, s) for v in page.variants for p in page.prompts for s in page.seeds]
    different = {page.pictures[key].sha256: page.pictures[key].path for key in keys if key in page.pictures}
    make = functools.partial(_inline, folder) if single_file else functools.partial(_filed, folder)
    made = {}
    # Pillow encodes outside Python's lock
    with ahead(make, different.values(), different) as results:
        for sha256, media in zip(different, results):
            made[sha256] = media
            progress(len(made), len(different))
    return made


def _filed(folder: Path, path: Path, sha256: str) -> _Media:
    """A picture's two files in media/, one where it is small; those that are there are not made again."""
    with _opened(path) as picture:
        width, height = picture.size
        large, thumbnail = (f"{_digest(size, sha256)}.webp" for size in ("large", "thumbnail"))
        if max(width, height) <= _THUMBNAIL:
            thumbnail = large
        for name, limit, quality in ((large, _LARGEST, 90), (thumbnail, _THUMBNAIL, 82)):
            if not (folder / name).exists():
                write_bytes(folder / name, _webp(picture, path, limit, quality))
    return _Media(large, thumbnail, width, height)


def _inline(_: Path, path: Path, sha256: str) -> _Media:
    """A picture as one data: URL."""
    with _opened(path) as picture:
        data = base64.b64encode(_webp(picture, path, _LARGEST_INLINE, 85)).decode("ascii")
        return _Media(f"data:image/webp;base64,{data}", "", *picture.size)


def _digest(size: str, sha256: str) -> str:
    return hashlib.sha256(f"{_RECIPE} {size} {sha256}".encode()).hexdigest()[:24]


def _opened(path: Path) -> Image.Image:
    try:
        return Image.open(path)
    except BROKEN as error:
        raise _unreadable(path) from error


def _webp(picture: Image.Image, path: Path, limit: int, quality: int) -> bytes:
    """The picture as WebP, at most `limit` pixels wide and high; one of few pixels keeps each of them as it is."""
    try:
        flat = Image.merge("RGB", flattened(picture).split())  # without a profile or text chunks
    except BROKEN as error:
        raise _unreadable(path) from error
    if max(flat.size) > limit:
        flat.thumbnail((limit, limit), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    flat.save(buffer, "WEBP", lossless=max(flat.size) <= _PIXELS, quality=quality, method=4)
    return buffer.getvalue()


def _unreadable(path: Path) -> TexforceError:
    return TexforceError(f"'{path}' is no picture, or only a part of one", "delete it and run the command again")


def _prune(folder: Path, needed: Iterable[str]) -> None:
    """Remove what an earlier page left in media/, and only that."""
    with contextlib.suppress(OSError):
        for path in sorted(folder.iterdir()):
            if _MEDIA_NAME.fullmatch(path.name) and path.name not in needed:
                path.unlink()


# --- text -------------------------------------------------------------------------------------------------------------


@functools.cache
def _environment() -> Environment:
    return Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True, auto_reload=False
    )


def template(name: str) -> Template:
    """A template of the page; what it is given is escaped."""
    return _environment().get_template(name)


def _tab_html(tab: Tab, media: Mapping[str, _Media], single_file: bool) -> str:
    if isinstance(tab.html_safe, str):
        return tab.html_safe
    return tab.html_safe({sha: m.large if single_file else f"media/{m.thumbnail}" for sha, m in media.items()})


def _html(page: Page, media: Mapping[str, _Media], single_file: bool) -> str:
    script = "".join((_TEMPLATES / f"{name}.js").read_text(encoding="utf-8") for name in _SCRIPTS)
    script = f'\n"use strict";\n(() => {{\n{script}}})();\n'
    style = "\n" + (_TEMPLATES / "page.css").read_text(encoding="utf-8")
    decimals = {metric.name: _decimals(page.rows, metric.name) for metric in page.metrics}
    return template("page.html").render(
        page=page,
        tabs=[(tab.id, tab.title, _tab_html(tab, media, single_file)) for tab in page.extra_tabs],
        policy=_policy(script, style, single_file),
        script=Markup(script),
        style=Markup(style),
        data=_json(_data(page, media, decimals)),
        rows=[_row_texts(page, row, decimals[row.metric]) for row in page.rows],
        colours=_colours(page),
        shown=shown,
        safe=Markup,
        pictures=len(page.pictures),
        hash=pictures_hash(page),
    )


def _policy(script: str, style: str, single_file: bool) -> str:
    """What the page may do: run its own script, use its own style, show its own pictures."""
    hashes = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode("ascii") for text in (script, style))
    own_script, own_style = (f"'sha256-{digest}'" for digest in hashes)
    images = "data:" if single_file else "'self' data:"
    return (
        f"default-src 'none'; script-src {own_script}; style-src {own_style}; img-src {images}; "
        "base-uri 'none'; form-action 'none'"
    )


def _json(value: Any) -> Markup:
    """JSON that no HTML parser takes for anything else, in ASCII."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return Markup(text.translate({ord(letter): f"\\u{ord(letter):04x}" for letter in "<>&"}))


def shown(text: str) -> str:
    """Text as it is shown: one line, control characters visible, nothing that reorders what stands around it."""
    return " ".join("".join(map(_shown_letter, text)).split())


@functools.lru_cache(maxsize=4096)
def _shown_letter(letter: str) -> str:
    code = ord(letter)
    if letter.isspace():
        return " "
    if unicodedata.category(letter) in ("Cs", "Cn"):
        return "\ufffd"
    if unicodedata.category(letter) == "Cc" or unicodedata.bidirectional(letter) in _BIDI:
        return f"[U+{code:04X}]"
    return letter


def _data(page: Page, media: Mapping[str, _Media], decimals: Mapping[str, int]) -> dict[str, Any]:
    """What the script reads. `pictures` and each of `scores` are flat: variant, then prompt, then seed."""
    variants = {variant.name: index for index, variant in enumerate(page.variants)}
    metrics = {metric.name: index for index, metric in enumerate(page.metrics)}
    index = {sha256: number for number, sha256 in enumerate(media)}
    keys = [(v.name, p.id, s) for v in page.variants for p in page.prompts for s in page.seeds]
    found = [page.pictures.get(key) for key in keys]
    return {
        "hash": pictures_hash(page),
        "baseline": variants[page.baseline],
        "variants": [
            {
                "name": v.name,
                "label": shown(v.name),
                "colour": _colours(page)[v.name],
                "in_sample": sorted(metrics[m] for m in v.in_sample & set(metrics)),
            }
            for v in page.variants
        ],
        "metrics": [
            {
                "label": shown(m.name),
                "unit": shown(m.unit),
                "higher": m.higher_is_better,
                "decimals": decimals[m.name],
            }
            for m in page.metrics
        ],
        "prompts": [
            {
                "id": p.id,
                "label": shown(p.id),
                "text": shown(p.text),
                "split": p.split,
                "categories": [shown(category) for category in p.categories],
            }
            for p in page.prompts
        ],
        "seeds": [seed if seed < _JS_INTEGERS else str(seed) for seed in page.seeds],
        "media": [[m.large, m.thumbnail, m.width, m.height] for m in media.values()],
        "sha256": list(media),
        "pictures": [index[picture.sha256] if picture else -1 for picture in found],
        "scores": [[_rounded(picture.scores.get(name)) if picture else None for picture in found] for name in metrics],
        "rows": [
            {
                "group": _GROUPS.get(row.group, shown(row.group)),
                "variant": variants[row.variant],
                "metric": metrics[row.metric],
                "difference": _rounded(row.difference),
                "low": _rounded(row.difference_low),
                "high": _rounded(row.difference_high),
                "label": shown(row.label),
            }
            for row in page.rows
        ],
        "wins": [
            [[_rounded(page.wins.get(m, {}).get(a, {}).get(b)) for b in variants] for a in variants] for m in metrics
        ],
    }


def _colours(page: Page) -> dict[str, str]:
    """The class that colours each variant: grey for the baseline, then seven colours in turn."""
    others = [variant.name for variant in page.variants if variant.name != page.baseline]
    return {page.baseline: "v0", **{name: f"v{1 + index % 7}" for index, name in enumerate(others)}}


def _rounded(value: float | None) -> float | None:
    """Seven digits are more than anyone sees; None for what is no number."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")


def _decimals(rows: Sequence[Row], metric: str) -> int:
    """How many decimals a metric is shown with: two digits of half its typical interval, of differences where it has any."""
    mine = [row for row in rows if row.metric == metric]
    ends = [(row.difference_low, row.difference_high) for row in mine], [(row.low, row.high) for row in mine]
    widths = [[(high - low) / 2 for low, high in pairs if low is not None and high is not None] for pairs in ends]
    widths.append([abs(row.mean) / 10 for row in mine if row.mean is not None])
    usable = ([width for width in some if width > 0 and math.isfinite(width)] for some in widths)
    sizes = next((some for some in usable if some), [])
    return min(6, max(0, 1 - math.floor(math.log10(statistics.median(sizes))))) if sizes else 3


def _row_texts(page: Page, row: Row, decimals: int) -> dict[str, Any]:
    """A line of the summary: its cells as text, and the numbers that they are sorted by."""
    variant = next(v for v in page.variants if v.name == row.variant)
    metric = next(m for m in page.metrics if m.name == row.metric)
    share = None if row.win_rate is None else 100 * row.win_rate
    return {
        "row": row,
        "metric": metric,
        "group": _GROUPS.get(row.group, shown(row.group)),
        "in_sample": row.metric in variant.in_sample,
        "mean": _number(row.mean, decimals),
        "interval": _interval(row.low, row.high, decimals),
        "difference": _number(row.difference, decimals, "+"),
        "difference_interval": _interval(row.difference_low, row.difference_high, decimals, "+"),
        "verdict": _verdict(row, metric.higher_is_better),
        "win_rate": _number(share, 1) + (" %" if share is not None else ""),
        "p": _p(row.p),
        "p_holm": _p(row.p_holm),
        "effect": _number(row.effect, 2, "+"),
        "detectable": _number(row.detectable, decimals),
    }


def _number(value: float | None, decimals: int, sign: str = "-") -> str:
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value:{sign}.{decimals}f}"
    # what is rounded to nothing has no sign
    return (text if text.strip("+-0.") else f"{0:.{decimals}f}").replace("-", "\u2212")


def _interval(low: float | None, high: float | None, decimals: int, sign: str = "-") -> str:
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    return f"{_number(low, decimals, sign)} to {_number(high, decimals, sign)}"


def _p(value: float | None) -> str:
    return "<0.001" if value is not None and value < 0.001 else _number(value, 3)


def _verdict(row: Row, higher_is_better: bool) -> str:
    """`better` or `worse` where the whole interval lies on one side of zero, else `unclear`; `same` where all is zero."""
    low, high = row.difference_low, row.difference_high
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return ""
    if low == high == 0:
        return "same"
    if low <= 0 <= high:
        return "unclear"
    return "better" if (low > 0) == higher_is_better else "worse"
