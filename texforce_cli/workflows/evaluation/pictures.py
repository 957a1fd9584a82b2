"""The pictures of an evaluation: the same noise for every variant, kept on the disk; and those that somebody else drew."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from texforce_cli.core.seeds import derive
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import from_json, user_path
from texforce_cli.prompts import Prompt
from texforce_cli.report.pictures import BROKEN, read_picture, save_png
from texforce_cli.rewards.builtin.scores_file import picture_hash
from texforce_cli.threads import ahead
from texforce_cli.workflows.evaluation.variants import Variant

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_INDEXES = ("metadata.jsonl", "index.jsonl")
_SEED = re.compile("[0-9]{1,18}")
_ROW = 'write {"file_name": ..., "prompt": ..., "seed": 0}'


@dataclass(frozen=True)
class Item:
    """One cell of an evaluation: a prompt and one of the seeds; `metadata` is what the prompt's file says beside, and
    `categories` are those of every line that has the text."""

    text: str
    seed: int
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)
    categories: tuple[str, ...] = field(default=(), compare=False)

    @property
    def prompt_id(self) -> str:
        """Short and the same everywhere: of the text alone."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()[:10]

    @property
    def name(self) -> str:
        """Of its picture's file, without the ending."""
        return f"{self.prompt_id}-{self.seed}"

    @property
    def noise(self) -> int:
        """The seed of its noise: of the text and the seed, whatever else is asked for. Prompts share no noise."""
        return derive(self.seed, "eval", self.text)


@dataclass(frozen=True)
class Found:
    """A picture that can be read: its file, the SHA-256 of the file's bytes and the hash of its pixels; and what the file says
    of the versions and the device that drew it, and of its noise, "" where it says nothing.

    Votes and rankings are about files. Scores are of pixels: what else a file says changes no score.
    """

    path: Path
    sha256: str
    pixels: str
    drawn_by: str = ""
    noise: str = ""


def items_of(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Item]:
    """Every prompt with every seed; a text that stands twice counts once, but in each of its categories."""
    lines: dict[str, list[Prompt]] = {}
    for prompt in prompts:
        lines.setdefault(prompt.text, []).append(prompt)
    return [
        Item(text, seed, same[0].metadata, tuple(dict.fromkeys(p.category for p in same if p.category)))
        for text, same in lines.items()
        for seed in dict.fromkeys(seeds)
    ]


def picture_path(folder: Path, variant: str, item: Item) -> Path:
    """Where a picture lies."""
    return folder / "pictures" / variant / f"{item.name}.png"


def picture_key(settings: Mapping[str, Any], item: Item) -> str:
    """What decides a picture: the settings of its variant, its prompt and its noise."""
    text = json.dumps([settings, item.text, item.noise], sort_keys=True)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def is_drawn(path: Path, key: str) -> bool:
    """Whether the file is a whole picture with this key."""
    try:
        with Image.open(path) as picture:
            if getattr(picture, "text", {}).get("key") != key:
                return False
            picture.load()
            return True
    except BROKEN:
        return False


def save_pictures(
    folder: Path,
    variant: str,
    items: Sequence[Item],
    pictures: Sequence[Image.Image],
    settings: Mapping[str, Any],
    drawn_by: str,
) -> None:
    """Write a batch, each file as one atomic step, with what it is in its text chunks; `drawn_by` decides nothing."""
    for item, picture in zip(items, pictures):
        texts = {
            "prompt": item.text,
            "seed": str(item.seed),
            "noise": str(item.noise),
            "variant": variant,
            "settings": json.dumps(settings, sort_keys=True),
            "key": picture_key(settings, item),
            "drawn_by": drawn_by,
        }
        save_png(picture_path(folder, variant, item), picture, texts)


def foreign_pictures(variant: Variant, items: Sequence[Item]) -> dict[Item, Path]:
    """The pictures of a folder that somebody else drew, by prompt and seed.

    They are told by `metadata.jsonl` (file_name, prompt or text, seed), or by the text chunks `prompt` and `seed` that
    `texforce sample` and `texforce eval` write. What is not asked for is passed over; what is missing is missing.

    Raises:
        UsageError: nothing in the folder tells prompts and seeds, or two pictures have the same.
    """
    assert variant.images is not None
    folder = user_path(variant.images)
    wanted = {(item.text, item.seed): item for item in items}
    found: dict[Item, Path] = {}
    told = 0
    for path, prompt, seed in _told(folder):
        told += 1
        item = wanted.get((prompt.strip(), seed))
        if item is not None and (first := found.setdefault(item, path)) != path:
            one, other = (f"{file.parent.name}/{file.name}" for file in (first, path))
            raise UsageError(
                f"'{folder}' has two pictures of '{prompt[:60]}' with seed {seed}, '{one}' and '{other}'",
                "give a folder that has one of each, or list those that count in its metadata.jsonl",
            )
    if not told:
        raise UsageError(
            f"nothing in '{folder}' tells which picture belongs to which prompt and seed",
            'add metadata.jsonl with lines like {"file_name": "a.png", "prompt": "a cat", "seed": 0}',
        )
    return found


def prompts_told(variant: Variant) -> list[str]:
    """The prompt of each picture of a folder that somebody else drew.

    Raises:
        UsageError: its index cannot be read.
    """
    assert variant.images is not None
    return [prompt.strip() for _, prompt, _ in _told(user_path(variant.images))]


def _told(folder: Path) -> Iterator[tuple[Path, str, int]]:
    for name in _INDEXES:
        if (folder / name).is_file():
            yield from _indexed(folder, folder / name)
            return
    for path in sorted(folder.rglob("*")):
        # hidden: what a kill left half renamed, what macOS and notebooks put beside
        hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
        if hidden or path.suffix.lower() not in _ENDINGS or not path.is_file():
            continue
        try:
            with Image.open(path) as picture:
                texts = getattr(picture, "text", {})
            prompt, seed = texts.get("prompt"), texts.get("seed", "")
        except BROKEN:
            continue
        if isinstance(prompt, str) and _SEED.fullmatch(str(seed)):
            yield path, prompt, int(seed)


def _indexed(folder: Path, index: Path) -> Iterator[tuple[Path, str, int]]:
    try:
        lines = index.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"'{index}' cannot be read as UTF-8 text", _ROW) from error
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = from_json(line)
            name, prompt, seed = row["file_name"], row.get("prompt", row.get("text")), row.get("seed", 0)
            if not isinstance(seed, int | str) or isinstance(seed, bool) or "\0" in name:
                raise TypeError("no seed, or no name")
            path = Path(
                os.path.normpath(folder.absolute() / name)
            )  # by the words: in the Hub's cache pictures are links
            inside = path.is_relative_to(os.path.normpath(folder.absolute()))
            seed = int(seed)
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise UsageError(f"line {number} of '{index}' is no row", _ROW) from error
        if not isinstance(prompt, str) or not inside:
            raise UsageError(f"line {number} of '{index}' has no prompt, or names a file outside", "correct the line")
        yield path, prompt, seed


def collect(
    folder: Path,
    variants: Sequence[Variant],
    items: Sequence[Item],
    settings: Mapping[str, Mapping[str, Any]],
    missing: Callable[[str, Item, str], None],
) -> dict[str, dict[Item, Found]]:
    """Variant -> item -> the picture, of those that are there and can be read; the others are told to `missing`.

    `settings` by variant are those that its pictures must have been drawn with; folders of somebody else have none.
    """
    found: dict[str, dict[Item, Found]] = {}
    for variant in variants:
        found[variant.name] = {}
        paths: list[Path | None]
        if variant.images:
            foreign = foreign_pictures(variant, items)
            paths = [foreign.get(item) for item in items]
        else:
            paths = [picture_path(folder, variant.name, item) for item in items]
        drawn = settings.get(variant.name)
        keys = [None if drawn is None else picture_key(drawn, item) for item in items]
        # Pillow and hashlib work outside Python's lock
        with ahead(_look, paths, keys) as results:
            for item, result in zip(items, results):
                if isinstance(result, Found):
                    found[variant.name][item] = result
                else:
                    missing(variant.name, item, result)
    return found


def _look(path: Path | None, key: str | None) -> Found | str:
    """The picture, or why there is none; `key` is the one that it must have."""
    if path is None:
        return "no picture"
    try:
        if not path.is_file():
            return "no picture"
        pixels = picture_hash(read_picture(path))
        with Image.open(path) as picture:
            written, drawn_by, noise = (str(picture.info.get(name, "")) for name in ("key", "drawn_by", "noise"))
        sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    except TexforceError as error:
        return error.message
    except BROKEN as error:
        return f"'{path.name[:80]}' cannot be read ({type(error).__name__})"
    if key not in (None, written):
        return "drawn with other settings"
    return Found(path, sha256, pixels, drawn_by or ("an earlier version of texforce" if written else ""), noise)


def comparability(found: Mapping[str, Mapping[Item, Found]]) -> list[str]:
    """What may make the pictures of a comparison differ besides their variants, in sentences."""
    said = []
    by = {name: sorted({one.drawn_by for one in pictures.values() if one.drawn_by}) for name, pictures in found.items()}
    if len(set().union(*by.values())) > 1:
        told = "; ".join(f"'{name}' by {' and by '.join(kinds)}" for name, kinds in by.items() if kinds)
        said.append(
            f"not all pictures were drawn by the same versions on the same kind of device ({told[:600]}), which may change "
            "them; to rule that out draw all of them into a new folder"
        )
    ours = {n: [one.noise == str(item.noise) for item, one in pictures.items()] for n, pictures in found.items()}
    others = [name for name, same in ours.items() if not all(same)]
    if others and any(same and all(same) for same in ours.values()):
        names = "', '".join(others)[:200]
        said.append(
            f"nothing tells that the pictures of '{names}' were drawn with the noise of the others: they are "
            "paired by prompt and seed all the same"
        )
    return said
