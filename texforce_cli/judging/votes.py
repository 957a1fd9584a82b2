"""What people chose in the blind mode of the page: the votes.json that it saves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from texforce_cli.errors import UsageError
from texforce_cli.files import read_json

_POINTS = {"left": 1.0, "tie": 0.5, "right": 0.0}
_LARGEST = 64_000_000


@dataclass(frozen=True)
class Vote:
    """One choice between two variants for the same prompt and noise; `points` are the left one's: 1, 0.5 or 0."""

    prompt_id: str
    seed: int
    left: str
    right: str
    points: float


def read_votes(path: Path, data: str) -> list[Vote]:
    """The votes of a file that the page made; `data` is the hash of the pictures that they must be about.

    Raises:
        UsageError: no such file, nothing of that kind, or votes about other pictures.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ValueError("it is too large")
        document = read_json(path)
        if document["texforce_votes"] != 1:
            raise ValueError("it is of another version")
        votes = [
            Vote(str(v["prompt"]), int(v["seed"]), str(v["left"]), str(v["right"]), _POINTS[v["winner"]])
            for v in document["votes"]
        ]
        about = document["data"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"'{path}' holds no votes ({str(error)[:100]})", "save them on the page's blind tab"
        ) from error
    if about != data:
        raise UsageError(f"the votes in '{path}' are about other pictures", "vote again on the present page")
    return votes
