"""What people chose in the blind mode of the page: the votes.json that it saves."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from texforce_cli.errors import UsageError
from texforce_cli.files import read_json

_POINTS = {"left": 1.0, "tie": 0.5, "right": 0.0}
_LARGEST = 64_000_000


@dataclass(frozen=True)
class Vote:
    """One choice between two variants for the same prompt and noise; `points` are the left one's: 1, 0.5 or 0. `pictures` are
    the SHA-256 of the left and of the right one; votes of earlier versions have none."""

    prompt_id: str
    seed: int
    left: str
    right: str
    points: float
    pictures: tuple[str, str] | None = None


@dataclass(frozen=True)
class Votes:
    """The votes of a file; `data` is the hash of everything on the page that they were cast on."""

    data: str
    votes: tuple[Vote, ...]

    def about(self, pictures: Mapping[tuple[str, str, int], str], data: str) -> list[Vote]:
        """Those on these `pictures`: (variant, prompt id, seed) -> SHA-256. A vote that names none is on them where the whole
        page is the same, of hash `data`."""
        return [vote for vote in self.votes if _pictures(vote, pictures) == vote.pictures or self._old(vote, data)]

    def _old(self, vote: Vote, data: str) -> bool:
        return vote.pictures is None and self.data == data


def _pictures(vote: Vote, pictures: Mapping[tuple[str, str, int], str]) -> tuple[str | None, ...]:
    return tuple(pictures.get((variant, vote.prompt_id, vote.seed)) for variant in (vote.left, vote.right))


def read_votes(path: Path) -> Votes:
    """The votes of a file that the page made.

    Raises:
        UsageError: no such file, or nothing of that kind.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        document = read_json(path)
        if document["texforce_votes"] != 1:
            raise ValueError("it is of another version")
        return Votes(str(document["data"]), tuple(map(_vote, document["votes"])))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UsageError(
            f"'{path}' holds no votes ({str(error)[:100]})", "save them on the page's blind tab"
        ) from error


def _vote(row: Mapping[str, Any]) -> Vote:
    pictures = row.get("pictures")
    return Vote(
        str(row["prompt"]),
        int(row["seed"]),
        str(row["left"]),
        str(row["right"]),
        _POINTS[row["winner"]],
        None if pictures is None else (str(pictures[0]), str(pictures[1])),
    )
