"""The judgments that were paid for: an append-only file, so that nothing on disk is ever asked again."""

from __future__ import annotations

import dataclasses
import json
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args, get_type_hints

from texforce_cli.errors import TexforceError
from texforce_cli.files import Lines
from texforce_cli.judging.judge import Reply
from texforce_cli.judging.prices import Usage, is_count
from texforce_cli.judging.questions import Mode, Question


@dataclass(frozen=True)
class Entry:
    """One reply, as it came. `key` is `Question.key` of the judge that was asked; `attempt` counts from 0."""

    key: str
    attempt: int
    mode: Mode
    prompt_id: str
    seed: int
    round: int
    variants: tuple[str, ...]
    placebo: bool
    text: str
    model: str
    input_tokens: int
    output_tokens: int
    refused: bool
    cut: bool
    raw: str = ""


_TYPES: dict[str, type] = {
    name: kind for name, kind in get_type_hints(Entry).items() if name not in ("mode", "variants")
}
_KEPT = [name for name in Reply.__dataclass_fields__ if name in _TYPES]


def check_reply(reply: Reply) -> None:
    """See that a reply can be kept and read again.

    Raises:
        TexforceError: the judge filled in something of another type.
    """
    for name in _KEPT:
        value, kind = getattr(reply, name, None), _TYPES[name]
        if type(value) is not kind or (kind is int and not is_count(value)):
            must = "a count of tokens" if kind is int else kind.__name__
            raise TexforceError(
                f"the judge's reply has {_shown(value)} for '{name}', which must be {must}", "repair the judge"
            )


def _shown(value: object) -> str:
    try:
        return repr(value)[:80]
    except ValueError:  # a number of more digits than Python writes
        return "too large a number"


def entry_of(key: str, attempt: int, question: Question, reply: Reply) -> Entry:
    """What is kept of a reply: neither paths nor pictures."""
    return Entry(
        key,
        attempt,
        question.mode,
        question.prompt_id,
        question.seed,
        question.round,
        question.variants,
        question.placebo,
        **{name: getattr(reply, name) for name in _KEPT},
    )


class Journal:
    """A file of entries, one JSON object a line. Lines that are no entries are passed over; a torn last line is dropped.

    Opening changes nothing on disk: the torn line is cut off by the first `append`. `append` and `entries` may be called
    from any thread; one process writes at a time.

    Raises:
        TexforceError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = Usage()
        """What the replies in the file used, as far as the judge said it."""
        self.picture_tokens = 0
        """The most input tokens for a picture, the text among them, that an answer was counted as."""
        self._lines, lines = Lines.opened(path)
        self._entries: dict[str, list[Entry]] = {}
        self._lock = threading.Lock()
        for line in lines:
            entry = _read(line)
            if entry is not None:
                if entry.variants:
                    self.picture_tokens = max(self.picture_tokens, -(-entry.input_tokens // len(entry.variants)))
                self._entries.setdefault(entry.key, []).append(entry)
                self.before += Usage(1, max(entry.input_tokens, 0), max(entry.output_tokens, 0))

    def entries(self, key: str) -> list[Entry]:
        """All replies to one question, in the order of their attempts."""
        with self._lock:
            return sorted(self._entries.get(key, []), key=lambda entry: entry.attempt)

    def append(self, entry: Entry) -> None:
        """Keep a reply: it is on the disk when this returns.

        Raises:
            TexforceError: the disk is full or read-only.
        """
        line = json.dumps(dataclasses.asdict(entry)).encode("ascii")
        with self._lock:
            self._lines.append(line)
            self._entries.setdefault(entry.key, []).append(entry)


def _read(line: bytes) -> Entry | None:
    """The entry in a line, if it is one."""
    try:
        row: Any = json.loads(line)
    except (ValueError, RecursionError):
        return None
    if not isinstance(row, dict):
        return None
    row.setdefault("raw", "")  # of a version that did not keep it
    if any(type(row.get(name)) is not kind for name, kind in _TYPES.items()):
        return None
    variants = row.get("variants")
    if row.get("mode") not in get_args(Mode) or not isinstance(variants, list):
        return None
    if not all(isinstance(name, str) for name in variants):
        return None
    return Entry(mode=row["mode"], variants=tuple(variants), **{name: row[name] for name in _TYPES})
