"""What a judge is asked: pictures of several variants for one prompt, in an order that a hash decides.

Sec. 3.5 of the paper has a vision-language model rank the pictures of all methods in three rounds (`listwise`); its exact
protocol was never published, so that this is a reconstruction. Pairs that are shown in both orders are nearer to what
people say (Chen et al., "MLLM-as-a-Judge", ICML 2024): `pairwise`, the default.
"""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from texforce_cli.core.seeds import derive

Mode = Literal["pairwise", "listwise", "pointwise"]
MODES: tuple[Mode, ...] = get_args(Mode)
MOST_VARIANTS = 26


@dataclass(frozen=True)
class Case:
    """The pictures of all variants for one prompt and one seed: variant -> (file, SHA-256 of its bytes)."""

    prompt_id: str
    prompt: str
    seed: int
    pictures: Mapping[str, tuple[Path, str]]


@dataclass(frozen=True)
class Question:
    """One request. `variants`, `files` and `hashes` are by slot: slot 0 is shown first, as picture A.

    Of these a judge is told the prompt and the pictures' pixels, nothing else. A `placebo` shows the same bytes twice.
    """

    mode: Mode
    prompt_id: str
    prompt: str
    seed: int
    round: int
    variants: tuple[str, ...]
    files: tuple[Path, ...]
    hashes: tuple[str, ...]
    placebo: bool = False

    @property
    def labels(self) -> tuple[str, ...]:
        """A, B, C, ... by slot."""
        return tuple("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(self.files)])

    def key(self, judge: str) -> str:
        """What a judgment is kept under: SHA-256 of the judge's identity and of all that it is shown, in order."""
        text = json.dumps([judge, self.mode, self.prompt, self.seed, self.round, self.hashes, self.placebo])
        return hashlib.sha256(text.encode("ascii")).hexdigest()


def questions_of(cases: Sequence[Case], mode: Mode, rounds: int, seed: int, placebos: float = 0.05) -> list[Question]:
    """All questions, in an order that depends on nothing else.

    pairwise: each pair of variants in both orders; listwise: all at once in an order drawn for each prompt and round;
    pointwise: one by one. `placebos` is the share of cases to which a pair of identical pictures is added (none pointwise).
    A variant whose picture is missing is left out of the case; a case with fewer than two is left out of comparisons.
    """
    found: list[Question] = []
    for case in cases:
        names = sorted(case.pictures)
        for number in range(rounds):
            if mode == "pointwise":
                found += [_question(case, mode, number, (name,)) for name in names]
            elif len(names) > 1 and mode == "listwise":
                found.append(_question(case, mode, number, _shuffled(names, case, number, seed)))
            elif len(names) > 1:
                for pair in itertools.combinations(names, 2):
                    found += [_question(case, mode, number, pair), _question(case, mode, number, pair[::-1])]
        if mode != "pointwise" and len(names) > 1 and _share("placebo", case, 0, seed) < placebos:
            name = _shuffled(names, case, -1, seed)[0]
            found.append(_question(case, mode, 0, (name, name), placebo=True))
    return found


def _question(case: Case, mode: Mode, number: int, variants: Sequence[str], placebo: bool = False) -> Question:
    files, hashes = zip(*(case.pictures[name] for name in variants))
    return Question(mode, case.prompt_id, case.prompt, case.seed, number, tuple(variants), files, hashes, placebo)


def _shuffled(names: Sequence[str], case: Case, number: int, seed: int) -> list[str]:
    return sorted(names, key=lambda name: _share(name, case, number, seed))


def _share(what: str, case: Case, number: int, seed: int) -> float:
    """A number in [0, 1) from the hash of all this."""
    return derive(seed, "judging", what, case.prompt_id, case.seed, number) / 2**63 % 1
