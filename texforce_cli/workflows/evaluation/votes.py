"""What people chose in the blind mode of the page, as one more judge."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean

from texforce_cli.core.comparison import unit_means
from texforce_cli.errors import UsageError
from texforce_cli.files import placed, user_path, write_bytes
from texforce_cli.judging.votes import Vote, read_votes
from texforce_cli.report.page import Row
from texforce_cli.workflows.evaluation.pictures import Item
from texforce_cli.workflows.evaluation.request import EvalRequest
from texforce_cli.workflows.evaluation.summary import MetricAbout, groups_of, row_of

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


def votes_about(
    request: EvalRequest, path: str, pictures: Mapping[tuple[str, str, int], str], data: str
) -> tuple[list[Vote], int]:
    """The votes of a file that are about these pictures, and how many are not. The folder keeps a copy, which counts where the
    file is no longer at its place, or holds votes about other pictures by now, as the next `votes.json` does.

    Raises:
        UsageError: as `read_votes`; there are votes, and all are about other pictures.
        TexforceError: the folder cannot be written.
    """
    file, kept = user_path(path), _kept(request, path)
    places = [file] if "votes" in request.given or not kept.is_file() else [file, kept] if placed(path) else [kept]
    for place in places:
        cast = read_votes(place)
        about = cast.about(pictures, data)
        if about and place == file:
            write_bytes(kept, file.read_bytes())
        if about or not cast.votes:
            return about, len(cast.votes) - len(about)
    raise UsageError(f"the votes in '{path}' are about other pictures", "vote again on the present page")


def _kept(request: EvalRequest, path: str) -> Path:
    name = hashlib.sha256(path.encode("utf-8", "surrogatepass")).hexdigest()[:10]
    return request.out / VOTES / f"{name}.json"


def count_votes(
    votes: Sequence[Vote], variants: Sequence[str], baseline: str, items: Sequence[Item], unseen: frozenset[str]
) -> tuple[MetricAbout, list[Row], dict[str, dict[str, float]]]:
    """Rows of each variant against the baseline, by the votes between those two, over all prompts and over each group of them,
    and the win rate of every pair.

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
        _row(group, about, variant, won)
        for group, members in groups_of(items, unseen).items()
        for variant in variants
        if variant != baseline
        and (won := {text: points for text, points in duels.get((variant, baseline), {}).items() if text in members})
    ]
    wins: dict[str, dict[str, float]] = {}
    for (one, other), won in duels.items():
        wins.setdefault(one, {})[other] = float(unit_means(won).mean())
    return about, rows, wins


def _row(group: str, about: MetricAbout, variant: str, won: Mapping[str, Sequence[float]]) -> Row:
    lost = {prompt: [1 - points for points in values] for prompt, values in won.items()}
    row = row_of(group, variant, about, won, lost, sum(map(len, won.values())))
    return replace(row, win_rate=row.mean)
