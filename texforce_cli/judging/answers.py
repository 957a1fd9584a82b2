"""What a judge answers: JSON in, a verdict out; what cannot be used is said, never guessed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from scipy import stats

from texforce_cli.judging.questions import Mode, Question

TIE = "tie"
LOWEST, HIGHEST = 1, 10
_LONGEST_REASON, _LONGEST_ANSWER = 2_000, 100_000
_MOST_BROKEN = 20
"""So many braces that begin nothing are passed over."""


class Unusable(Exception):
    """An answer that is no verdict; the text says why, in words that the judge can be told."""


@dataclass(frozen=True)
class Opinion:
    """What a judge thinks by one criterion: `ranks` by slot, 1 is best, ties share their mean rank; pointwise `scores`."""

    ranks: tuple[float, ...] = ()
    scores: tuple[float, ...] = ()
    reason: str = ""


Verdict = dict[str, Opinion]
"""Criterion -> opinion."""


def schema(mode: Mode, labels: Sequence[str], criteria: Sequence[str]) -> dict[str, Any]:
    """The JSON schema of an answer, in the strict subset that servers enforce. The reason stands before the choice."""
    if mode == "pairwise":
        choice: dict[str, Any] = {"winner": {"type": "string", "enum": [*labels, TIE]}}
    elif mode == "listwise":
        places = {label: {"type": "integer"} for label in labels}
        choice = {"ranks": _object(places)}
    else:
        choice = {"score": {"type": "integer"}}
    one = _object({"reason": {"type": "string"}, **choice})
    return _object(dict.fromkeys(criteria, one))


def parse(text: str, question: Question, criteria: Sequence[str]) -> Verdict:
    """The verdict in a reply: the JSON object with the criteria in it, alone, fenced or within other text.

    Raises:
        Unusable: no whole such object, or two that say different things; a criterion missing, a label that was not shown, a
            key given twice, a number out of its range.
    """
    answers = [found for found in _objects_in(text) if any(criterion in found for criterion in criteria)]
    if not answers:
        raise Unusable(f"'{criteria[0]}' is missing")
    verdicts = [{criterion: _opinion(answer, criterion, question) for criterion in criteria} for answer in answers]
    if any(_choices(verdict) != _choices(verdicts[0]) for verdict in verdicts):
        raise Unusable("it holds two answers")
    return verdicts[0]


def _choices(verdict: Verdict) -> dict[str, Opinion]:
    """A verdict without its reasons."""
    return {criterion: replace(opinion, reason="") for criterion, opinion in verdict.items()}


def encodable(text: str) -> str:
    """The text without half characters, such as an emoji that was cut leaves: neither file nor request can carry them."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _object(properties: dict[str, Any]) -> dict[str, Any]:
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


def _objects_in(text: str) -> list[dict[str, Any]]:
    """Every whole JSON object in a reply, without those within others."""
    text = text.rpartition("</think>")[2][:_LONGEST_ANSWER]  # after what reasoning models say to themselves
    decoder = json.JSONDecoder(object_pairs_hook=_once)
    found: list[dict[str, Any]] = []
    problem, broken = "it holds no JSON object", 0
    start = text.find("{")
    while start >= 0 and broken < _MOST_BROKEN:
        try:
            one, end = decoder.raw_decode(text, start)
            found.append(one)
        except (ValueError, RecursionError) as error:
            if not broken:
                problem = f"its JSON cannot be read ({str(error)[:80]})"
            broken, end = broken + 1, start + 1
        start = text.find("{", end)
    if not found:
        raise Unusable(problem)
    return found


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key is given twice")
    return found


def _opinion(answer: dict[str, Any], criterion: str, question: Question) -> Opinion:
    one = answer.get(criterion)
    if not isinstance(one, dict):
        raise Unusable(f"'{criterion}' is missing")
    reason = encodable(str(one.get("reason", ""))[:_LONGEST_REASON])
    if question.mode == "pointwise":
        return Opinion(scores=(_score(one, criterion),), reason=reason)
    ranks = _winner(one, criterion, question) if question.mode == "pairwise" else _ranks(one, criterion, question)
    return Opinion(ranks=ranks, reason=reason)


def _winner(one: dict[str, Any], criterion: str, question: Question) -> tuple[float, ...]:
    winner = one.get("winner")
    if winner == TIE:
        return (1.5, 1.5)
    if winner not in question.labels:
        raise Unusable(f"the winner of '{criterion}' must be one of {', '.join(question.labels)} or {TIE}")
    return (1.0, 2.0) if winner == question.labels[0] else (2.0, 1.0)


def _ranks(one: dict[str, Any], criterion: str, question: Question) -> tuple[float, ...]:
    ranks = one.get("ranks")
    if not isinstance(ranks, dict) or set(ranks) != set(question.labels):
        raise Unusable(f"the ranks of '{criterion}' must name {', '.join(question.labels)}, each once")
    given = [ranks[label] for label in question.labels]
    if not all(isinstance(rank, int) and not isinstance(rank, bool) and 1 <= rank <= len(given) for rank in given):
        raise Unusable(f"the ranks of '{criterion}' must be whole numbers from 1 to {len(given)}")
    return tuple(float(rank) for rank in stats.rankdata(given))


def _score(one: dict[str, Any], criterion: str) -> float:
    score = one.get("score")
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise Unusable(f"the score of '{criterion}' is no number")
    if not LOWEST <= score <= HIGHEST:
        raise Unusable(f"the score of '{criterion}' must be from {LOWEST} to {HIGHEST}")
    return float(score)
