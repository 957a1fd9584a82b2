"""How the pictures of a variant are drawn, kept beside them from before the first one: settings, and who shares a batch."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from texforce_cli.files import read_json, write_json, write_text
from texforce_cli.workflows.evaluation.pictures import Item, is_drawn, picture_key, picture_path

_FILE = "drawing.json"


@dataclass(frozen=True)
class Layout:
    """`asked` stands for the words that were asked with, `settings` for what they came to; `batches` hold names of items.

    The last bits of a picture depend on its neighbours. An evaluation that was stopped, shared among processes or given more
    seeds shall be the same as one that was not, and a model drawn twice be equal to itself: so a batch once laid out stays, also
    for the variants that come later, and new items make batches of their own. What could not be drawn (a file beside the
    pictures says so) is tried again alone, where its neighbours are there.
    """

    asked: str
    settings: Mapping[str, Any]
    batch: int
    batches: tuple[tuple[str, ...], ...] = ()

    def makes(self, settings: Mapping[str, Any]) -> bool:
        """Whether pictures of these settings are the same as of one's own. What a LoRA's file is called makes no picture; and
        earlier versions of texforce did not tell the configurations of a model."""
        with contextlib.suppress(TypeError, AttributeError):  # what is kept may be anything
            return self._deciding(self.settings) == self._deciding(settings)
        return False

    def _deciding(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        told = {name: value for name, value in settings.items() if name in self.settings or name != "configs"}
        return {**told, "loras": [{**about, "file": ""} for about in settings.get("loras", ())]}

    def covering(self, items: Sequence[Item], *earlier: Layout | None) -> Layout:
        """With batches for all items: those of the first of `earlier` that are as large, and new ones."""
        kept = next((one.batches for one in earlier if one is not None and one.batch == self.batch), ())
        placed = set(chain.from_iterable(kept))
        new = [item.name for item in items if item.name not in placed]
        cut = (tuple(new[start : start + self.batch]) for start in range(0, len(new), self.batch))
        return replace(self, batches=(*kept, *cut))

    def wanting(
        self, folder: Path, variant: str, items: Sequence[Item], shard: tuple[int, int] = (0, 1)
    ) -> list[list[Item]]:
        """The batches in which a picture of `items` is missing, of some only what failed; of `shard` (i, n) every n-th from the
        i-th."""
        named = {item.name: item for item in items}
        parts = [[named[name] for name in batch if name in named] for batch in self.batches[shard[0] :: shard[1]]]
        wanted = []
        for part in parts:
            lacking = [item for item in part if not self._is_drawn(folder, variant, item)]
            if len(lacking) < len(part) and all(_mark(folder, variant, item).exists() for item in lacking):
                wanted += [[item] for item in lacking]
            elif lacking:
                wanted.append(part)
        return wanted

    def _is_drawn(self, folder: Path, variant: str, item: Item) -> bool:
        return is_drawn(picture_path(folder, variant, item), picture_key(self.settings, item))


def read_layout(folder: Path, variant: str) -> Layout | None:
    """What is kept of a variant; None where there is nothing that can be read."""
    try:
        stored = read_json(_place(folder, variant))
        batches = tuple(tuple(map(str, batch)) for batch in stored["batches"])
        return Layout(str(stored["asked"]), dict(stored["settings"]), int(stored["batch"]), batches)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def read_layouts(folder: Path) -> list[Layout]:
    """What is kept of all variants that were ever drawn in a folder, by their names."""
    names = sorted(path.parent.name for path in (folder / "pictures").glob(f"*/{_FILE}"))
    return [layout for name in names if (layout := read_layout(folder, name))]


def write_layout(folder: Path, variant: str, layout: Layout) -> None:
    """Keep it.

    Raises:
        TexforceError: the folder cannot be written.
    """
    write_json(_place(folder, variant), asdict(layout))


def note_failed(folder: Path, variant: str, items: Sequence[Item], why: str) -> None:
    """Keep that `items` of a variant could not be drawn: a file each, for several processes draw one variant.

    Raises:
        TexforceError: the folder cannot be written.
    """
    for item in items:
        write_text(_mark(folder, variant, item), why + "\n")


def note_drawn(folder: Path, variant: str, items: Sequence[Item]) -> None:
    """What was kept of failures of `items` no longer holds."""
    for item in items:
        _mark(folder, variant, item).unlink(missing_ok=True)


def _mark(folder: Path, variant: str, item: Item) -> Path:
    return picture_path(folder, variant, item).with_suffix(".failed")


def _place(folder: Path, variant: str) -> Path:
    return folder / "pictures" / variant / _FILE
