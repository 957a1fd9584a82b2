"""What people chose in the blind mode of the page, as one more judge."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from texforce_cli.core.comparison import unit_means
from texforce_cli.errors import UsageError
from texforce_cli.files import user_path, write_bytes
from texforce_cli.judging.votes import Vote, Votes, read_votes
from texforce_cli.report.page import Row
from texforce_cli.workflows.evaluation.pictures import Item
from texforce_cli.workflows.evaluation.request import EvalRequest
from texforce_cli.workflows.evaluation.summary import MetricAbout, row_of
from texforce_cli.workflows.evaluation.variants import placed

VOTES = "votes"


def check_votes(request: EvalRequest) -> None:
    """Whether each file of votes that was given can be read.

    Raises:
        UsageError: as `read_votes`.
    """
    for path in request.votes if "votes" in request.given else ():
        if not ((file := placed(path)) and file.is_file()):
            raise UsageError(f"there is no file '{path}'", "check --votes")
        read_votes(file)


def keep_votes(request: EvalRequest) -> None:
    """Copy each file of votes that can be read into the folder.

    Raises:
        TexforceError: the folder cannot be written.
    """
    for path in request.votes:
        with contextlib.suppress(UsageError):
            read_votes(file := user_path(path))
            write_bytes(_kept(request, path), file.read_bytes())


def votes_of(request: EvalRequest, path: str) -> Votes:
    """The votes of a file; of one that is no longer at its place, as the folder keeps it.

    Raises:
        UsageError: as `read_votes`.
    """
    kept = _kept(request, path)
    return read_votes(kept if kept.is_file() and not placed(path) else user_path(path))


def _kept(request: EvalRequest, path: str) -> Path:
    name = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return request.out / VOTES / f"{name}.json"


def count_votes(
    votes: Sequence[Vote], variants: Sequence[str], baseline: str, items: Sequence[Item]
) -> tuple[MetricAbout, list[Row], dict[str, dict[str, float]]]:
    """Rows of each variant against the baseline, by the votes between those two, and the win rate of every pair.

    Votes on the same two pictures are averaged: who votes twice, or a file that is given twice, makes no interval narrower.
    """
    texts = {item.prompt_id: item.text for item in items}
    names = set(variants)
    usable = [v for v in votes if v.prompt_id in texts and v.left != v.right and {v.left, v.right} <= names]
    cast: dict[tuple[str, str], dict[str, dict[int, list[float]]]] = {}
    for vote in usable:
        for one, other, points in ((vote.left, vote.right, vote.points), (vote.right, vote.left, 1 - vote.points)):
            by_seed = cast.setdefault((one, other), {}).setdefault(texts[vote.prompt_id], {})
            by_seed.setdefault(vote.seed, []).append(points)
    duels = {
        pair: {prompt: [fmean(points) for points in by_seed.values()] for prompt, by_seed in by_prompt.items()}
        for pair, by_prompt in cast.items()
    }
    about = MetricAbout(VOTES, "", True, "the share of blind votes that it won", f"{len(usable)} votes")
    rows = [
        _row(about, variant, duels[variant, baseline])
        for variant in variants
        if variant != baseline and (variant, baseline) in duels
    ]
    wins: dict[str, dict[str, float]] = {}
    for (one, other), won in duels.items():
        wins.setdefault(one, {})[other] = float(unit_means(won).mean())
    return about, rows, wins


def _row(about: MetricAbout, variant: str, won: Mapping[str, Sequence[float]]) -> Row:
    lost = {prompt: [1 - points for points in values] for prompt, values in won.items()}
    row = row_of("all", variant, about, won, lost, sum(map(len, won.values())))
    return replace(row, win_rate=row.mean)
