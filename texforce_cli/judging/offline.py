"""Judges that need no network: a reward that knows prompts, and the votes of people."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import stats

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import contents_hash, user_path
from texforce_cli.judging.answers import HIGHEST, LOWEST, TIE
from texforce_cli.judging.judge import ALIGNMENT, Failed, Repair, Reply
from texforce_cli.judging.questions import MODES, Case, Mode, Question
from texforce_cli.judging.votes import read_votes
from texforce_cli.report.pictures import BROKEN, read_picture
from texforce_cli.rewards.isolation import WorkerSettings
from texforce_cli.rewards.registry import load_registry
from texforce_cli.rewards.terms import RewardSet, TermSpec, find

_EMBEDDED_SIDE = 64
PREFERENCE = "preference"


class ClipJudge:
    """Ranks by a reward that compares picture and prompt: tiny-judge where the pictures are the embedded model's (64
    pixels), CLIP ViT-B/32 (`clip-score`) elsewhere, or `reward`, with its own `weights` where those are given. It knows
    nothing of aesthetic quality."""

    criteria: tuple[str, ...] = (ALIGNMENT,)

    def __init__(self, reward: str = "", weights: str = "") -> None:
        self.identity = self.setting = ""
        self._options = {"weights": weights} if weights else {}
        self.modes: tuple[Mode, ...] = MODES
        self._name = reward
        self._rewards: RewardSet | None = None
        self._known: dict[tuple[str, str], float] = {}
        self._lock = threading.Lock()

    def prepare(self, cases: Sequence[Case], data: str) -> None:
        """Choose the reward by the first picture."""
        del data
        if not self._name:
            self._name = "tiny-judge" if _side(cases) <= _EMBEDDED_SIDE else "clip-score"
        registry = load_registry()
        spec = TermSpec(self._name, options=self._options)
        info = find(spec, registry)
        self._low, self._high = info.range or (0.0, 0.0)
        self._sign = 1.0 if info.higher_is_better else -1.0
        if not info.range:
            self.modes = ("pairwise", "listwise")  # a score from 1 to 10 needs to know the reward's ends
        made_with = [info.origin, info.exact_version, *map(contents_hash, self._options.values())]
        self.identity = json.dumps(["clip", 1, self._name, *made_with])
        self.setting = json.dumps(["clip", self._name, *self._options.values()])
        # when it is asked first: a dry run loads nothing
        self._make = lambda: RewardSet([spec], registry, workers=WorkerSettings(failures=1))

    def ask(self, question: Question, repairs: Sequence[Repair] = ()) -> Reply:
        """Its verdict, by the scores of the pictures."""
        del repairs
        with self._lock:
            scores = [self._score(question, slot) for slot in range(len(question.files))]
        if question.mode == "pointwise":
            share = min(1.0, max(0.0, (self._sign * scores[0] - self._worst) / (self._high - self._low)))
            choice: dict[str, Any] = {"score": LOWEST + share * (HIGHEST - LOWEST)}
        else:
            ranks = stats.rankdata([-self._sign * score for score in scores], method="min")
            if question.mode == "listwise":
                choice = {"ranks": {label: int(rank) for label, rank in zip(question.labels, ranks)}}
            else:
                choice = {"winner": TIE if ranks[0] == ranks[1] else question.labels[int(np.argmin(ranks))]}
        shown = ", ".join(f"{label} {score:.4g}" for label, score in zip(question.labels, scores))
        return Reply(json.dumps({ALIGNMENT: {"reason": f"{self._name}: {shown}", **choice}}), model=self._name)

    def close(self) -> None:
        """Let the reward go."""
        if self._rewards:
            self._rewards.close()

    @property
    def _worst(self) -> float:
        return min(self._sign * self._low, self._sign * self._high)

    def _score(self, question: Question, slot: int) -> float:
        key = question.hashes[slot], question.prompt
        if key not in self._known:
            if self._rewards is None:
                self._rewards = self._make()
            try:
                images = _pixels(question.files[slot])[None]
                self._known[key] = float(self._rewards.score(images, [question.prompt], [{}])[self._name][0])
            except TexforceError as error:
                raise Failed(
                    f"'{question.files[slot].name}' could not be scored: {error.message}", retry=False
                ) from error
        return self._known[key]


class VotesJudge:
    """Answers with what people chose on the page of the same pictures: `file` is the votes.json that it saved."""

    criteria: tuple[str, ...] = (PREFERENCE,)
    modes: tuple[Mode, ...] = ("pairwise",)

    def __init__(self, file: str = "") -> None:
        if not file:
            raise UsageError("the judge 'votes' needs a file", "add --judge-option file=votes.json")
        self._file = user_path(file)
        self.identity = ""
        self.setting = "votes"  # more votes make the same ranking anew
        # prompt and pictures -> points of the first picture: votes are on pictures, whoever drew them
        self._points: dict[tuple[str, str, str], list[float]] = {}

    def prepare(self, cases: Sequence[Case], data: str) -> None:
        """Read the votes that are about these pictures."""
        drawn = {(case.prompt_id, case.seed): case for case in cases}
        pictures = {(v, c.prompt_id, c.seed): sha256 for c in cases for v, (_, sha256) in c.pictures.items()}
        cast = read_votes(self._file)
        about = cast.about(pictures, data)
        if cast.votes and not about:
            raise UsageError(f"the votes in '{self._file}' are about other pictures", "vote again, or give --seeds")
        for vote in about:
            case = drawn.get((vote.prompt_id, vote.seed))
            if case and {vote.left, vote.right} <= set(case.pictures):
                left, right = case.pictures[vote.left][1], case.pictures[vote.right][1]
                self._points.setdefault((case.prompt, left, right), []).append(vote.points)
                self._points.setdefault((case.prompt, right, left), []).append(1 - vote.points)
        self.identity = json.dumps(["votes", 1, hashlib.sha256(self._file.read_bytes()).hexdigest()])

    def ask(self, question: Question, repairs: Sequence[Repair] = ()) -> Reply:
        """Who got more points from people on this pair; a pair that nobody voted on has no verdict."""
        del repairs
        if question.hashes[0] == question.hashes[1]:
            same = {"reason": "the same picture twice", "winner": TIE}
            return Reply(json.dumps({PREFERENCE: same}), model="people")
        points = self._points.get((question.prompt, question.hashes[0], question.hashes[1]), [])
        if not points:
            return Reply("nobody voted on this pair", model="people", refused=True)
        mean = float(np.mean(points))
        winner = TIE if mean == 0.5 else question.labels[0 if mean > 0.5 else 1]
        reason = "1 vote" if len(points) == 1 else f"{len(points)} votes"
        return Reply(json.dumps({PREFERENCE: {"reason": reason, "winner": winner}}), model="people")


def _pixels(path: Path) -> NDArray[np.uint8]:
    try:
        return read_picture(path)
    except TexforceError as error:
        raise Failed(error.message, retry=False, asked=False) from error


def _side(cases: Sequence[Case]) -> int:
    """The longest side of the first picture that can be read."""
    for case in cases:
        for path, _ in case.pictures.values():
            try:
                with Image.open(path) as picture:
                    return max(picture.size)
            except BROKEN:
                continue
    return 0
