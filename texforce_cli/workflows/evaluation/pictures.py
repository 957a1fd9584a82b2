"""The pictures of an evaluation: the same noise for every variant, kept on the disk, drawn again only when they must be."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image

from texforce_cli.core.seeds import derive
from texforce_cli.errors import UsageError
from texforce_cli.prompts import Prompt
from texforce_cli.report.pictures import save_png
from texforce_cli.workflows.evaluation.variants import Variant

_ENDINGS = (".png", ".jpg", ".jpeg", ".webp")
_INDEXES = ("metadata.jsonl", "index.jsonl")


@dataclass(frozen=True)
class Item:
    """One cell of an evaluation: a prompt and one of the seeds; `metadata` is what the prompt's file says beside."""

    text: str
    seed: int
    metadata: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def prompt_id(self) -> str:
        """Short and the same everywhere: of the text alone."""
        return hashlib.sha256(self.text.encode("utf-8")).hexdigest()[:10]

    @property
    def noise(self) -> int:
        """The seed of its noise: of the text and the seed, whatever else is asked for. Prompts share no noise."""
        return derive(self.seed, "eval", self.text)


def items_of(prompts: Sequence[Prompt], seeds: Sequence[int]) -> list[Item]:
    """Every prompt with every seed; a text that stands twice counts once."""
    distinct = {prompt.text: prompt for prompt in reversed(prompts)}
    ordered = [distinct[text] for text in dict.fromkeys(prompt.text for prompt in prompts)]
    return [Item(prompt.text, seed, prompt.metadata) for prompt in ordered for seed in dict.fromkeys(seeds)]


def picture_path(folder: Path, variant: str, item: Item) -> Path:
    """Where a picture lies."""
    return folder / "pictures" / variant / f"{item.prompt_id}-{item.seed}.png"


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
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return False


def wanting(
    folder: Path,
    variant: str,
    items: Sequence[Item],
    settings: Mapping[str, Any],
    *,
    batch: int,
    shard: tuple[int, int] = (0, 1),
) -> list[Sequence[Item]]:
    """The batches in which a picture is missing; of `shard` (i, n) every n-th from the i-th.

    Batches are cut the same way each time: the last bits of a picture depend on its neighbours, and an evaluation that was
    resumed, or shared among processes, shall be the same as one that was not.
    """
    batches = [items[start : start + batch] for start in range(0, len(items), batch)]
    return [
        part
        for index, part in enumerate(batches)
        if index % shard[1] == shard[0]
        and not all(is_drawn(picture_path(folder, variant, item), picture_key(settings, item)) for item in part)
    ]


def save_pictures(
    folder: Path, variant: str, items: Sequence[Item], pictures: Sequence[Image.Image], settings: Mapping[str, Any]
) -> None:
    """Write a batch, each file as one atomic step, with what it is in its text chunks."""
    for item, picture in zip(items, pictures):
        texts = {
            "prompt": item.text,
            "seed": str(item.seed),
            "noise": str(item.noise),
            "variant": variant,
            "settings": json.dumps(settings, sort_keys=True),
            "key": picture_key(settings, item),
        }
        save_png(picture_path(folder, variant, item), picture, texts)


def foreign_pictures(variant: Variant, items: Sequence[Item]) -> dict[Item, Path]:
    """The pictures of a folder that somebody else drew, by prompt and seed.

    They are told by `metadata.jsonl` (file_name, prompt or text, seed), or by the text chunks `prompt` and `seed` that
    `texforce sample` and `texforce eval` write. What is not asked for is passed over; what is missing is missing.

    Raises:
        UsageError: nothing in the folder tells prompts and seeds.
    """
    assert variant.images is not None
    folder = Path(variant.images).expanduser()
    wanted = {(item.text, item.seed): item for item in items}
    found: dict[Item, Path] = {}
    told = 0
    for path, prompt, seed in _told(folder):
        told += 1
        item = wanted.get((prompt, seed))
        if item is not None:
            found.setdefault(item, path)
    if not told:
        raise UsageError(
            f"nothing in '{folder}' tells which picture belongs to which prompt and seed",
            'add metadata.jsonl with lines like {"file_name": "a.png", "prompt": "a cat", "seed": 0}',
        )
    return found


def _told(folder: Path) -> Iterator[tuple[Path, str, int]]:
    for name in _INDEXES:
        if (folder / name).is_file():
            yield from _indexed(folder, folder / name)
            return
    for path in sorted(folder.rglob("*")):
        if path.suffix.lower() not in _ENDINGS or not path.is_file():
            continue
        try:
            with Image.open(path) as picture:
                texts = getattr(picture, "text", {})
            prompt, seed = texts.get("prompt"), texts.get("seed", "")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
            continue
        if isinstance(prompt, str) and str(seed).isdigit():
            yield path, prompt, int(seed)


def _indexed(folder: Path, index: Path) -> Iterator[tuple[Path, str, int]]:
    for number, line in enumerate(index.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, prompt, seed = row["file_name"], row.get("prompt", row.get("text")), int(row.get("seed", 0))
            path = (folder / name).resolve()
            inside = path.is_relative_to(folder.resolve())
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UsageError(
                f"line {number} of '{index}' is no row", 'write {"file_name": ..., "prompt": ..., "seed": 0}'
            ) from error
        if not isinstance(prompt, str) or not inside:
            raise UsageError(f"line {number} of '{index}' has no prompt, or names a file outside", "correct the line")
        yield path, prompt, seed


def collect(
    folder: Path, variants: Sequence[Variant], items: Sequence[Item], missing: Callable[[str, Item, str], None]
) -> dict[str, dict[Item, tuple[Path, str]]]:
    """Variant -> item -> file and SHA-256, of the pictures that are there; the others are told to `missing`."""
    found: dict[str, dict[Item, tuple[Path, str]]] = {}
    for variant in variants:
        foreign = foreign_pictures(variant, items) if variant.images else {}
        found[variant.name] = {}
        for item in items:
            path = foreign.get(item) if variant.images else picture_path(folder, variant.name, item)
            try:
                if path is None:
                    raise FileNotFoundError
                found[variant.name][item] = (path, hashlib.sha256(path.read_bytes()).hexdigest())
            except OSError:
                missing(variant.name, item, "no picture")
    return found
