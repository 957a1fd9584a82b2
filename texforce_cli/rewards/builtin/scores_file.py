"""Scores that other tools or people gave, from a table of pictures by their hash."""

from __future__ import annotations

import csv
import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import from_json, user_path

_SUFFIXES = (".csv", ".jsonl", ".json")


def picture_hash(picture: Image.Image | NDArray[np.uint8]) -> str:
    """SHA-256 in hexadecimal of "WIDTHxHEIGHT\\n" and the RGB bytes, row by row: the same for every lossless format."""
    if isinstance(picture, Image.Image):
        picture = np.asarray(picture.convert("RGB"))
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise ValueError(f"a picture is uint8 [height, width, 3], not {picture.dtype} {list(picture.shape)}")
    height, width, _ = picture.shape
    return hashlib.sha256(f"{width}x{height}\n".encode() + np.ascontiguousarray(picture).tobytes()).hexdigest()


class ScoresFile:
    """The score that a table has for a picture.

    Args:
        path: a .csv with the columns `picture` and `score`, a .jsonl of objects with these keys, or a .json that is
            a list of such objects or one object {picture: score}. A picture is named by `picture_hash`.
        missing: "error", or the number that a picture has which is not in the table.
    """

    input = "uint8"

    def __init__(self, path: str = "", missing: str = "error") -> None:
        if not path:
            raise UsageError("the reward scores-file has no table", "give one: --reward-option scores-file.path=FILE")
        self._path = user_path(path)
        self._scores = _read(self._path)
        self._missing = None if missing == "error" else _number(missing, "the option scores-file.missing")
        self.counts = {"pictures_not_in_the_table": 0}

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One score an image.

        Raises:
            TexforceError: a picture that is not in the table, where `missing` is "error"; its hash is named.
        """
        return [self._of(picture_hash(image)) for image in images]

    def _of(self, name: str) -> float:
        if name in self._scores:
            return self._scores[name]
        if self._missing is None:
            raise TexforceError(
                f"'{self._path.name}' has no score for the picture {name}",
                "add it, or say what it is worth with --reward-option scores-file.missing=NUMBER",
            )
        self.counts["pictures_not_in_the_table"] += 1
        return self._missing


def _read(path: Path) -> dict[str, float]:
    if path.suffix not in _SUFFIXES:
        raise UsageError(f"'{path.name}' is no table of scores", f"give a file that ends in {', '.join(_SUFFIXES)}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise TexforceError(
            f"'{path}' cannot be read ({error})", "see --reward-option scores-file.path=FILE"
        ) from error
    scores: dict[str, float] = {}
    for number, (name, value) in enumerate(_rows(path, text), 1):
        where = f"row {number} of '{path.name}'"
        if len(name) != 64 or set(name) - set("0123456789abcdef"):
            raise TexforceError(f"{where} names the picture '{name[:80]}'", "name it by its picture_hash, 64 digits")
        score = _number(value, where)
        if scores.setdefault(name, score) != score:
            raise TexforceError(f"{where} gives a second score to the picture {name}", "keep one of them")
    return scores


def _rows(path: Path, text: str) -> list[tuple[str, Any]]:
    try:
        if path.suffix == ".csv":
            rows: Any = list(csv.DictReader(text.splitlines()))
        elif path.suffix == ".jsonl":
            rows = [from_json(line) for line in text.splitlines() if line.strip()]
        else:
            rows = from_json(text)
            if isinstance(rows, dict):
                return list(rows.items())
        return [(str(row["picture"]).strip().lower(), row["score"]) for row in rows]
    except (ValueError, KeyError, TypeError, csv.Error) as error:
        raise TexforceError(
            f"'{path.name}' is no table of scores ({type(error).__name__}: {error})",
            "each row needs `picture` and `score`",
        ) from error


def _number(value: Any, where: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{where} says '{value}', which is no finite number", "write one, as in 0.5")
    return number
