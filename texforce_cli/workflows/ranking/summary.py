"""The ranking that follows from a set of verdicts; the same verdicts give the same bytes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from texforce_cli.core.comparison import holm, interval
from texforce_cli.core.ranking import (
    Duel,
    bradley_terry,
    detectable_rate,
    kendall_w,
    krippendorff_alpha,
    position_effect,
    sign_test,
    win_rates,
)
from texforce_cli.core.statistics import Interval
from texforce_cli.judging.answers import Opinion
from texforce_cli.judging.questions import Question

Opinions = Sequence[tuple[Question, Opinion]]
Floats = NDArray[np.float64]
_BIAS, _LEVEL, _FEWEST = 0.1, 0.05, 5
Ranks = dict[str, dict[int, dict[int, dict[str, float]]]]
"""Prompt -> round -> seed -> variant -> rank."""


def rank(opinions: Opinions, variants: Sequence[str], rounds: int) -> dict[str, Any]:
    """What one criterion says: mean ranks, Bradley-Terry strengths, wins, tests, agreement, and how far to trust it."""
    real = [(question, opinion) for question, opinion in opinions if not question.placebo]
    shown, duels = shown_duels(real), settled_duels(real)
    ranks = case_ranks(real, variants)
    tests = {pair: sign_test(duels, *pair) for pair in itertools.combinations(variants, 2)}
    effect = position_effect(shown)
    flips = _flips(real)
    return {
        "mean_rank": _mean_ranks(ranks, variants, rounds),
        "bradley_terry": {name: _plain(value) for name, value in bradley_terry(duels, variants).items()},
        "wins": win_rates(duels, variants),
        "tests": [
            {"first": one, "second": two, "rate": test.rate, "p": test.p, "prompts": test.prompts}
            for (one, two), test in tests.items()
            if test.prompts
        ],
        "agreement_of_rounds": _agreement(ranks, variants),
        "alpha_of_rounds": _alpha(ranks, variants, rounds),
        "position": {"first_shown_won": effect.rate, "p": effect.p, "biased": _biased(effect.rate, effect.p)},
        "flipped": float(np.mean(flips)) if flips else math.nan,
        "placebo": _placebo([(question, opinion) for question, opinion in opinions if question.placebo]),
        "detectable_rate": detectable_rate(len({duel.prompt for duel in duels})),
        "prompts": len({duel.prompt for duel in duels}),
    }


def adjust(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Holm's adjustment over the tests of all criteria, written into them."""
    tests = [test for result in results.values() for test in result["tests"]]
    for test, p in zip(tests, holm([test["p"] for test in tests])):
        test["p_holm"] = p


def warnings(results: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Sentences on a judge that cannot be trusted."""
    found = []
    for criterion, result in results.items():
        rate, placebo = result["position"]["first_shown_won"], result["placebo"]
        if result["position"]["biased"]:
            found.append(f"{criterion}: the picture shown first wins {rate:.0%} of the points: the judge is biased")
        if placebo["pairs"] >= _FEWEST and placebo["ties"] < 0.5:
            found.append(
                f"{criterion}: of two identical pictures the judge prefers one in {1 - placebo['ties']:.0%} of the cases"
            )
        if math.isfinite(result["flipped"]) and result["flipped"] > 0.5:
            found.append(f"{criterion}: {result['flipped']:.0%} of the verdicts change with the order of the pictures")
    return found


def shown_duels(opinions: Opinions) -> list[Duel]:
    """Every pair as it was shown, to see what the order does. Half a pair is left out: it would tell of the variants."""
    whole = {key for key, found in _grouped(opinions).items() if found[0][1] != "pairwise" or len(found) == 2}
    return [
        Duel(question.prompt_id, question.variants[i], question.variants[j], _points(opinion, i, j), j - i)
        for question, opinion in opinions
        if opinion.ranks and (question.mode != "pairwise" or _pair_key(question) in whole)
        for i, j in itertools.combinations(range(len(question.variants)), 2)
    ]


def settled_duels(opinions: Opinions) -> list[Duel]:
    """One duel for each pair, case and round. A pair shown in both orders counts once: who wins in both wins, a verdict that
    flips is a tie; one with an order missing is left out. Scores are compared within a round."""
    settled = []
    for pair, found in _grouped(opinions).items():
        prompt, _, _, first, second = pair
        points = [p for p, _ in found]
        if found[0][1] == "pairwise" and len(found) < 2:
            continue
        settled.append(Duel(prompt, first, second, float(np.mean(points)), 0))
    return settled


def case_ranks(opinions: Opinions, variants: Sequence[str]) -> Ranks:
    """The rank of every variant in each case and round, 1 is best, ties with mean ranks; cases in which a variant lacks
    are left out."""
    points: dict[tuple[str, int, int], dict[str, dict[str, float]]] = {}
    for (prompt, seed, number, first, second), found in _grouped(opinions).items():
        if found[0][1] == "pairwise" and len(found) < 2:
            continue
        table = points.setdefault((prompt, seed, number), {})
        value = float(np.mean([p for p, _ in found]))
        table.setdefault(first, {})[second] = value
        table.setdefault(second, {})[first] = 1 - value
    ranks: Ranks = {}
    for (prompt, seed, number), table in points.items():
        if all(len(table.get(name, {})) == len(variants) - 1 for name in variants):
            places = stats.rankdata([-sum(table[name].values()) for name in variants])
            by_seed = ranks.setdefault(prompt, {}).setdefault(number, {})
            by_seed[seed] = dict(zip(variants, map(float, places)))
    return ranks


def _grouped(opinions: Opinions) -> dict[tuple[str, int, int, str, str], list[tuple[float, str]]]:
    """(prompt, seed, round, first, second) -> points of the first, from each question that compares the two."""
    found: dict[tuple[str, int, int, str, str], list[tuple[float, str]]] = {}
    scores: dict[tuple[str, int, int], dict[str, float]] = {}
    for question, opinion in opinions:
        case = question.prompt_id, question.seed, question.round
        if opinion.scores:
            scores.setdefault(case, {})[question.variants[0]] = opinion.scores[0]
        for i, j in itertools.combinations(range(len(question.variants)), 2):
            one, two, points = question.variants[i], question.variants[j], _points(opinion, i, j)
            if one > two:
                one, two, points = two, one, 1 - points
            found.setdefault((*case, one, two), []).append((points, question.mode))
    for case, given in scores.items():
        for one, two in itertools.combinations(sorted(given), 2):
            points = (float(np.sign(given[one] - given[two])) + 1) / 2
            found.setdefault((*case, one, two), []).append((points, "pointwise"))
    return dict(sorted(found.items()))


def _pair_key(question: Question) -> tuple[str, int, int, str, str]:
    first, second = sorted(question.variants)
    return question.prompt_id, question.seed, question.round, first, second


def _points(opinion: Opinion, i: int, j: int) -> float:
    return (float(np.sign(opinion.ranks[j] - opinion.ranks[i])) + 1) / 2


def _flips(opinions: Opinions) -> list[float]:
    pairs = [[p for p, _ in found] for found in _grouped(opinions).values() if found[0][1] == "pairwise"]
    return [float(abs(pair[0] - pair[1]) == 1) for pair in pairs if len(pair) == 2]


def _mean_ranks(ranks: Ranks, variants: Sequence[str], rounds: int) -> dict[str, Any]:
    def over(numbers: Sequence[int], name: str) -> dict[str, Any] | None:
        means = []
        for by_round in ranks.values():
            values = [seeds[name] for number in numbers for seeds in by_round.get(number, {}).values()]
            if values:
                means.append(float(np.mean(values)))
        return _plain(interval(means)) if means else None

    return {
        name: {
            "all": over(range(rounds), name),
            "rounds": [over([number], name) for number in range(rounds)],
        }
        for name in variants
    }


def _agreement(ranks: Ranks, variants: Sequence[str]) -> float:
    """Kendall's W between the rounds of a prompt and seed: the mean over seeds, then over prompts."""
    prompts = []
    for by_round in ranks.values():
        seeds = dict.fromkeys(seed for found in by_round.values() for seed in found)
        tables = [[found[seed] for found in by_round.values() if seed in found] for seed in seeds]
        values = [kendall_w(np.array([[row[name] for name in variants] for row in table])) for table in tables]
        prompts.append([value for value in values if math.isfinite(value)])
    known = [float(np.mean(values)) for values in prompts if values]
    return float(np.mean(known)) if known else math.nan


def _alpha(ranks: Ranks, variants: Sequence[str], rounds: int) -> float:
    """Krippendorff's alpha (ordinal) of the rounds, over the ranks of every variant in every case; a round may lack some."""
    cases = sorted({(prompt, seed) for prompt, found in ranks.items() for seeds in found.values() for seed in seeds})
    values = [
        [ranks[prompt].get(number, {}).get(seed, {}).get(name, math.nan) for prompt, seed in cases for name in variants]
        for number in range(rounds)
    ]
    return krippendorff_alpha(np.array(values, dtype=np.float64))


def _placebo(opinions: Opinions) -> dict[str, Any]:
    points = [_points(opinion, 0, 1) for _, opinion in opinions]
    return {
        "pairs": len(points),
        "ties": float(np.mean([p == 0.5 for p in points])) if points else math.nan,
        "first_shown_won": float(np.mean(points)) if points else math.nan,
    }


def _biased(rate: float, p: float) -> bool:
    return bool(math.isfinite(rate) and abs(rate - 0.5) > _BIAS and p < _LEVEL)


def _plain(value: Interval) -> dict[str, Any]:
    return {"mean": value.mean, "low": value.low, "high": value.high}
