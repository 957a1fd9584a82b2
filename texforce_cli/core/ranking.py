"""Rankings from judgments: Bradley-Terry strengths, mean ranks, agreement of rounds, bias of position.

Judgments of one prompt resemble each other: intervals are bootstraps over prompts, never over judgments. Sec. 3.5 of the
paper ranks by the mean rank of three rounds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats

from texforce_cli.core.comparison import FEWEST, expanded_tail
from texforce_cli.core.statistics import Interval

Floats = NDArray[np.float64]

RIDGE = 0.1
"""Weight of the penalty on strengths: data in which one side always wins have finite strengths."""
_RESAMPLES = 1000


@dataclass(frozen=True)
class Duel:
    """One comparison of two variants for a prompt: `points` of the first, 1, 0.5 or 0; `slots` is how much sooner the
    first one's picture was shown (positive: before the second's)."""

    prompt: str
    first: str
    second: str
    points: float
    slots: int = 1


def bradley_terry(duels: Sequence[Duel], variants: Sequence[str], *, ridge: float = RIDGE) -> dict[str, Interval]:
    """Log-strengths with mean 0: P(i beats j) = 1 / (1 + exp(s_j - s_i)) (Bradley, Terry 1952), ties as half wins, by
    penalised maximum likelihood; 95 % intervals of an expanded percentile bootstrap over prompts, whose number is n.

    An interval has no ends below 20 prompts, where the bootstrap is too narrow, where every resample is the same (one side
    always wins: how strong it is, the data do not say), and for a variant that nobody judged, which has 0.
    """
    tables = np.stack([_points(part, variants) for part in _by_prompt(duels).values()] or [_points([], variants)])
    middle = _strengths(tables.sum(axis=0), ridge)
    rng = np.random.default_rng(0)
    picks = rng.integers(len(tables), size=(_RESAMPLES, len(tables)))
    weights = np.stack([np.bincount(row, minlength=len(tables)) for row in picks])
    fits = _strengths(np.tensordot(weights, tables, axes=1), ridge)
    enough = len(tables) >= FEWEST
    tail = expanded_tail(len(tables)) if enough else 0.025
    low, high = np.quantile(fits, (tail, 1 - tail), axis=0)
    judged = (tables.sum(axis=0) + tables.sum(axis=0).T).any(axis=1)
    return {
        name: Interval(float(middle[i]), float(low[i]), float(high[i]), len(tables))
        if judged[i] and enough and high[i] - low[i] > 1e-9
        else Interval(float(middle[i]), -math.inf, math.inf, len(tables))
        for i, name in enumerate(variants)
    }


def win_rates(duels: Sequence[Duel], variants: Sequence[str]) -> dict[str, dict[str, float]]:
    """Row against column: the share of points, prompts counted equally; pairs that were never judged are absent."""
    by_pair: dict[tuple[str, str], dict[str, list[float]]] = {}
    for duel in duels:
        for one, other, points in ((duel.first, duel.second, duel.points), (duel.second, duel.first, 1 - duel.points)):
            by_pair.setdefault((one, other), {}).setdefault(duel.prompt, []).append(points)
    return {
        row: {
            column: float(np.mean([np.mean(points) for points in by_pair[row, column].values()]))
            for column in variants
            if (row, column) in by_pair
        }
        for row in variants
    }


def kendall_w(ranks: Floats) -> float:
    """Kendall's coefficient of concordance of `ranks` [judges, objects], corrected for ties (which share their mean rank):
    1 where all judges agree, 0 where their ranks sum to the same for every object (Kendall, Babington Smith 1939).
    nan where there is nothing to agree on: fewer than two judges, or all objects tied by all.
    """
    judges, objects = ranks.shape
    sums = ranks.sum(axis=0)
    deviation = float(np.sum((sums - sums.mean()) ** 2))
    ties = sum(float(count**3 - count) for row in ranks for count in np.unique(row, return_counts=True)[1])
    most = judges**2 * (objects**3 - objects) - judges * ties
    return 12 * deviation / most if judges > 1 and most > 0 else math.nan


def krippendorff_alpha(values: Floats) -> float:
    """Krippendorff's alpha of ordinal `values` [judges, objects], nan where a judge gave none: 1 where all agree, 0 where they
    agree as by chance, below 0 where they agree less (Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011).
    nan where no object has two values, or all values are the same.
    """
    known = np.unique(values[np.isfinite(values)])
    if len(known) < 2:
        return math.nan
    counts = np.stack([(values == value).sum(axis=0) for value in known], axis=1)
    counts = counts[counts.sum(axis=1) > 1].astype(np.float64)  # [objects, values]; a lone value has no partner
    given = counts.sum(axis=1)[:, None, None]
    same = np.eye(counts.shape[1]) * counts[:, None, :]
    observed = ((counts[:, :, None] * counts[:, None, :] - same) / np.maximum(given - 1, 1)).sum(axis=0)
    total = observed.sum(axis=0)
    places = np.cumsum(total) - total / 2  # an ordinal value lies where half of its own kind are below it
    distance = (places[:, None] - places[None, :]) ** 2
    expected = float((np.outer(total, total) * distance).sum())
    return 1 - (total.sum() - 1) * float((observed * distance).sum()) / expected if expected > 0 else math.nan


@dataclass(frozen=True)
class SignTest:
    """The share of points, prompts counted equally, and the two-sided p of a sign test over prompts of its being a half."""

    rate: float
    p: float
    prompts: int


def position_effect(duels: Sequence[Duel]) -> SignTest:
    """The share of points that went to the picture that was shown sooner. Pairs shown in both orders give a judge without
    bias one half."""
    return _sign_test([(d.prompt, d.points if d.slots > 0 else 1 - d.points) for d in duels if d.slots])


def sign_test(duels: Sequence[Duel], first: str, second: str) -> SignTest:
    """The share of points of `first` against `second`."""
    mine = [duel for duel in duels if {duel.first, duel.second} == {first, second}]
    return _sign_test([(d.prompt, d.points if d.first == first else 1 - d.points) for d in mine])


def detectable_rate(prompts: int) -> float:
    """The smallest win rate above one half that a sign test over so many prompts finds with 80 % power, at 5 %; nan where
    even a win everywhere is not enough."""
    if prompts < 6 or _power(prompts, 1.0) < 0.8:
        return math.nan
    return float(optimize.brentq(lambda rate: _power(prompts, rate) - 0.8, 0.5, 1.0))


def _sign_test(points: Sequence[tuple[str, float]]) -> SignTest:
    by_prompt: dict[str, list[float]] = {}
    for prompt, value in points:
        by_prompt.setdefault(prompt, []).append(value)
    means = [float(np.mean(values)) for values in by_prompt.values()]
    if not means:
        return SignTest(math.nan, math.nan, 0)
    above, below = sum(mean > 0.5 for mean in means), sum(mean < 0.5 for mean in means)
    p = float(stats.binomtest(above, above + below).pvalue) if above + below else 1.0
    return SignTest(float(np.mean(means)), p, len(means))


def _power(n: int, rate: float) -> float:
    # the fewest wins whose two-sided p is at most 5 %
    least = int(stats.binom.isf(0.025, n, 0.5)) + 1
    return float(stats.binom.sf(least - 1, n, rate))


def _by_prompt(duels: Sequence[Duel]) -> Mapping[str, list[Duel]]:
    found: dict[str, list[Duel]] = {}
    for duel in duels:
        found.setdefault(duel.prompt, []).append(duel)
    return found


def _points(duels: Sequence[Duel], variants: Sequence[str]) -> Floats:
    """Points of row against column."""
    place = {name: index for index, name in enumerate(variants)}
    points = np.zeros((len(variants), len(variants)))
    for duel in duels:
        i, j = place[duel.first], place[duel.second]
        points[i, j] += duel.points
        points[j, i] += 1 - duel.points
    return points


def _strengths(points: Floats, ridge: float) -> Floats:
    """Newton's method on points [..., variants, variants], all tables at once; the penalty makes the minimum unique."""
    games = points + points.swapaxes(-1, -2)
    size = points.shape[-1]
    strengths = np.zeros(points.shape[:-1])
    for _ in range(100):
        chance = 0.5 * (1 + np.tanh((strengths[..., :, None] - strengths[..., None, :]) / 2))
        slope = (points - games * chance).sum(axis=-1) - 2 * ridge * strengths
        bend = games * chance * (1 - chance)
        hessian = np.eye(size) * (bend.sum(axis=-1) + 2 * ridge)[..., None] - bend
        step = np.linalg.solve(hessian, slope[..., None])[..., 0]
        strengths = strengths + step
        if np.abs(step).max() < 1e-10:
            break
    return np.asarray(strengths - strengths.mean(axis=-1, keepdims=True))
