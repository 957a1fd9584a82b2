"""Prompts: built-in sets by name, fetched sets at a pinned revision, and files; each split into seen and unseen."""

from __future__ import annotations

import csv
import hashlib
import io
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from texforce_cli.errors import UsageError, did_you_mean
from texforce_cli.files import from_json, user_path
from texforce_cli.presets import Family

_SUFFIXES = (".txt", ".jsonl", ".csv")
_LARGEST_FILE = 64_000_000


@dataclass(frozen=True)
class Prompt:
    """A text, and whatever else its file says about it (rewards are given it as metadata)."""

    text: str
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def category(self) -> str:
        """That its file gives it; "" for none."""
        category = self.metadata.get("category")
        return str(category).strip() if isinstance(category, str | int | float) else ""


@dataclass(frozen=True)
class PromptSet:
    """Prompts to train on (`seen`) and prompts that only measurements use (`unseen`, may be empty)."""

    name: str
    source: str
    seen: tuple[Prompt, ...]
    unseen: tuple[Prompt, ...] = ()

    @property
    def sha256(self) -> str:
        """SHA-256 over all prompts in order."""
        return hashlib.sha256(self.to_jsonl().encode("utf-8")).hexdigest()

    def to_jsonl(self) -> str:
        """One line a prompt, as `load_prompts` reads it again."""
        rows = [{"prompt": p.text, **p.metadata} for p in self.seen]
        rows += [{"prompt": p.text, **p.metadata, "split": "unseen"} for p in self.unseen]
        return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def load_prompts(spec: str, family: Family, *, to_train: bool = True) -> PromptSet:
    """The prompts that `--prompts` names: a set, or a .txt, .jsonl or .csv file.

    On the embedded model (`family` tiny) a set holds the combinations of words that it knows; on Stable Diffusion the
    phrases of the paper. Not `to_train`: all prompts may be unseen.

    Raises:
        UsageError: no such set or file, or a file that is empty, binary, too large, without prompts, or that has a prompt
            in both splits.
    """
    from texforce_cli.prompts.fetched import FETCHED, fetch
    from texforce_cli.prompts.sets import SETS

    if spec in SETS:
        seen, unseen = SETS[spec](family)
        return PromptSet(spec, "built-in", tuple(map(Prompt, seen)), tuple(map(Prompt, unseen)))
    if spec in FETCHED:
        return fetch(spec)
    if Path(spec).suffix.lower() in _SUFFIXES:
        return _checked(read_prompts(user_path(spec)), to_train)
    names = [*SETS, *FETCHED]
    raise UsageError(
        f"unknown prompts '{spec}'",
        f"{did_you_mean(spec, names)}Give one of {', '.join(names)}, or a file ({', '.join(_SUFFIXES)})",
    )


def _checked(found: PromptSet, to_train: bool) -> PromptSet:
    if to_train and not found.seen:
        raise UsageError(f"'{found.source}' holds no prompt to train on", "leave the split of some prompts out")
    both = {prompt.text for prompt in found.seen} & {prompt.text for prompt in found.unseen}
    if both:
        raise UsageError(f"'{min(both)[:80]}' is seen and unseen in '{found.source}'", "keep one of the two")
    return found


def read_prompts(path: Path) -> PromptSet:
    """A file of prompts: .txt one a line; .jsonl objects with `prompt`; .csv with a column `prompt`.

    Other keys and columns become metadata, except `split`, which may be `seen` or `unseen`.

    Raises:
        UsageError: it cannot be read as that; the sentence names the line.
    """
    text = _text(path)
    if path.suffix.lower() == ".jsonl":
        rows = _jsonl(path, text)
    elif path.suffix.lower() == ".csv":
        rows = _csv(path, text)
    else:
        rows = [{"prompt": line} for line in _lines(text) if line.strip()]
    splits: dict[str, list[Prompt]] = {"seen": [], "unseen": []}
    for number, row in enumerate(rows, 1):
        values = dict(row)
        prompt, split = values.pop("prompt", None), values.pop("split", "seen") or "seen"
        if not isinstance(prompt, str) or not prompt.strip():
            raise UsageError(f"prompt {number} of '{path}' is no text", "give each row a 'prompt'")
        if not isinstance(split, str) or split not in splits:
            raise UsageError(f"prompt {number} of '{path}' has the split '{split}'", "write seen or unseen")
        splits[split].append(Prompt(prompt.strip(), values))
    if not any(splits.values()):
        raise UsageError(f"'{path}' holds no prompt", "write one prompt a line")
    return PromptSet(path.name, str(path), tuple(splits["seen"]), tuple(splits["unseen"]))


def _text(path: Path) -> str:
    try:
        if path.stat().st_size > _LARGEST_FILE:
            raise UsageError(f"'{path}' has {path.stat().st_size:,} bytes", "a prompt file has at most 64 MB")
        data = path.read_bytes()
    except FileNotFoundError:
        raise UsageError(f"there is no file '{path}'", "check --prompts") from None
    except OSError as error:
        raise UsageError(f"'{path}' cannot be read ({error.strerror})", "check --prompts") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UsageError(f"'{path}' is not UTF-8 text (byte {error.start})", "save it as UTF-8") from error
    if "\x00" in text:
        raise UsageError(f"'{path}' is binary", "give a text file")
    if not text.strip():
        raise UsageError(f"'{path}' is empty", "write one prompt a line")
    return text


def _lines(text: str) -> list[str]:
    # not splitlines(): it also splits at characters that a prompt may hold
    return text.replace("\r\n", "\n").split("\n")


def _jsonl(path: Path, text: str) -> Iterable[Mapping[str, Any]]:
    for number, line in enumerate(_lines(text), 1):
        if not line.strip():
            continue
        try:
            row = from_json(line)
            json.dumps(row, ensure_ascii=False).encode("utf-8")  # JSON may hold half a character
        except UnicodeEncodeError as error:
            raise UsageError(
                f"line {number} of '{path}' holds half a character", "correct its \\ud8... to \\udf..."
            ) from error
        except ValueError as error:
            raise UsageError(f"line {number} of '{path}' is not JSON", 'write {"prompt": "a cat"}') from error
        if not isinstance(row, dict):
            raise UsageError(f"line {number} of '{path}' is no JSON object", 'write {"prompt": "a cat"}')
        yield row


def _csv(path: Path, text: str) -> Iterable[Mapping[str, Any]]:
    reader = csv.DictReader(io.StringIO(text, newline=""))
    try:
        if "prompt" not in (reader.fieldnames or []):
            raise UsageError(f"'{path}' has no column 'prompt'", "name it in the first line")
        for row in reader:
            yield {key: value for key, value in row.items() if key is not None and value is not None}
    except csv.Error as error:
        raise UsageError(f"'{path}' is not a CSV file (line {reader.line_num}: {error})", "save it again") from error
