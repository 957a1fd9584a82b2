"""Comparing variants on the same prompts and noise: paired differences, clustered by prompt.

Pictures of one prompt resemble each other, so that prompts and not pictures are what is counted: values are averaged over
the seeds of a prompt first, then over prompts. With one prompt its seeds are counted, which says something of this prompt
alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from texforce_cli.core.statistics import Interval, mean_interval

Floats = NDArray[np.float64]
ByPrompt = Mapping[str, Sequence[float]]
"""Prompt -> a value for each of its seeds."""

RESAMPLES = 10_000
FEWEST = 20
_CHUNK = 2_000_000
_COUNTED = 13
"""Differences up to which all signs that they can have are counted."""
_ROUNDING = 1e-12
"""Numbers that differ by less, as a share of the largest, differ by how they were rounded."""


@dataclass(frozen=True)
class Comparison:
    """One variant against the baseline by one metric, over prompts that both have.

    `difference` in the metric's unit; `win_rate` of pictures, ties half; `p` of Wilcoxon's signed-rank test, None of one
    unit; `effect` the mean difference over its standard deviation (Cohen's d_z); `detectable` the smallest difference that
    this many units find with 80 % power. Prompts are counted, or the seeds of the only one.
    """

    difference: Interval
    win_rate: float
    p: float | None
    effect: float
    detectable: float


def unit_means(values: ByPrompt) -> Floats:
    """The mean of each prompt; with one prompt, its values."""
    rows = [np.asarray(row, dtype=np.float64) for row in values.values()]
    return rows[0] if len(rows) == 1 else np.array([row.mean() for row in rows])


def _without_dust(values: Floats, scale: float) -> Floats:
    """Differences of numbers as large as `scale`, without the dust of rounding: 0 where it is all they are, and one value where
    it is all that is between them."""
    dust = _ROUNDING * scale
    values = np.where(np.abs(values) <= dust, 0.0, values)
    return np.full_like(values, np.median(values)) if np.ptp(values) <= dust else values


def _differences(values: ByPrompt, baseline: ByPrompt) -> tuple[dict[str, Floats], float]:
    """By prompt, seed by seed; and the largest magnitude of what they are differences of."""
    pairs = {p: (np.asarray(values[p], np.float64), np.asarray(baseline[p], np.float64)) for p in values}
    scale = max(float(np.abs(pair).max()) for pair in pairs.values())
    return {p: _without_dust(ours - theirs, scale) for p, (ours, theirs) in pairs.items()}, scale


def interval(values: Sequence[float], seed: int = 0) -> Interval:
    """Mean and 95 % interval of independent values: Student's t below 20, the expanded percentile bootstrap above.

    Expanded (Hesterberg 2015): percentiles beyond 2.5 and 97.5, by as much as makes up for what the plain bootstrap is too
    narrow. Values that are all the same, as a single one is, do not tell how they vary: from minus to plus infinity.
    """
    array = np.asarray(values, dtype=np.float64)
    array = _without_dust(array, float(np.abs(array).max()))
    n, mean = len(array), float(array.mean())
    if np.ptp(array) == 0:
        return Interval(float(array[0]), -math.inf, math.inf, n)
    if n < FEWEST:
        return mean_interval(array.tolist())
    tail = expanded_tail(n)
    rng = np.random.default_rng(seed)
    means: list[Floats] = []
    size = max(1, _CHUNK // n)
    for start in range(0, RESAMPLES, size):
        picks = rng.integers(n, size=(min(size, RESAMPLES - start), n))
        means.append(array[picks].mean(axis=1))
    low, high = np.quantile(np.concatenate(means), (tail, 1 - tail))
    return Interval(mean, float(low), float(high), n)


def expanded_tail(n: int) -> float:
    """The lower percentile, as a share, of the expanded bootstrap (Hesterberg 2015) of n values: below 0.025."""
    return float(stats.norm.cdf(-math.sqrt(n / (n - 1)) * stats.t.ppf(0.975, n - 1)))


def compare(
    values: ByPrompt, baseline: ByPrompt, *, higher_is_better: bool = True, identical: bool = False
) -> Comparison:
    """A variant against the baseline; both have the same prompts, and of each the same seeds in the same order. Of `identical`
    pictures, as of the same model twice, the difference is 0, from 0 to 0; other pictures that score the same do not tell how they vary.

    Raises:
        ValueError: they do not belong together.
    """
    if values.keys() != baseline.keys() or any(len(values[p]) != len(baseline[p]) for p in values) or not values:
        raise ValueError("the values of the two do not belong together")
    pairs, scale = _differences(values, baseline)
    units = _without_dust(unit_means({p: row.tolist() for p, row in pairs.items()}), scale)
    sign = 1.0 if higher_is_better else -1.0
    won = unit_means({p: ((np.sign(sign * row) + 1) / 2).tolist() for p, row in pairs.items()})
    n, same = len(units), identical and not units.any()
    difference = Interval(0.0, 0.0, 0.0, n) if same and n > 1 else interval(units.tolist())
    spread = 0.0 if np.ptp(units) == 0 else float(units.std(ddof=1))
    mean = difference.mean
    reach = float(stats.t.ppf(0.975, n - 1) + stats.t.ppf(0.8, n - 1))
    return Comparison(
        difference=difference,
        win_rate=float(won.mean()),
        p=signed_rank(units),
        effect=mean / spread if spread > 0 else (0.0 if mean == 0 else math.copysign(math.inf, mean)),
        detectable=reach * spread / math.sqrt(n) if math.isfinite(difference.low) else math.nan,
    )


def signed_rank(differences: Floats) -> float | None:
    """Two-sided p of Wilcoxon's signed-rank test (Pratt's treatment of zeros); 1 where nothing differs, none of a
    single value, which is nothing to test.

    Exact for up to 13 that are not 0, counted over all their signs: the normal distribution, which SciPy takes where there are
    zeros or ties among 14, makes .05 of .125.
    """
    if len(differences) < 2:
        return None
    differing = differences != 0
    ranks = stats.rankdata(np.abs(differences))[differing]
    if len(ranks) > _COUNTED:
        return float(stats.wilcoxon(differences, zero_method="pratt").pvalue)
    balances = np.zeros(1)
    for rank in ranks:
        balances = np.concatenate([balances - rank, balances + rank])
    found = np.sign(differences[differing]) @ ranks
    return float(np.mean(np.abs(balances) >= abs(found)))


def holm(values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979), in the order given."""
    order = np.argsort(values)
    adjusted, largest = [0.0] * len(values), 0.0
    for position, index in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - position) * float(values[index])))
        adjusted[int(index)] = largest
    return adjusted


def win_matrix(values: Mapping[str, ByPrompt], *, higher_is_better: bool = True) -> dict[str, dict[str, float]]:
    """Row against column: the share of pictures in which the row's is better, ties half, prompts counted equally."""
    sign = 1.0 if higher_is_better else -1.0
    matrix: dict[str, dict[str, float]] = {}
    for row, ours in values.items():
        matrix[row] = {}
        for column, theirs in values.items():
            if row != column:
                pairs, _ = _differences(ours, theirs)
                rates = [np.mean((np.sign(sign * pair) + 1) / 2) for pair in pairs.values()]
                matrix[row][column] = float(np.mean(rates))
    return matrix


def diversity(pictures: Sequence[NDArray[np.uint8]]) -> float:
    """How much the pictures of one prompt differ: mean distance of pairs, root mean square of 0 to 1, at 32 x 32 pixels.

    Near 0 where every seed gives the same picture: what a collapsed model does. uint8 [height, width, 3]; 2 or more.
    """
    small = np.stack([_shrunk(picture) for picture in pictures])
    first, second = np.triu_indices(len(small), 1)
    return float(np.mean(np.sqrt(np.mean((small[first] - small[second]) ** 2, axis=(1, 2, 3)))))


def _shrunk(picture: NDArray[np.uint8]) -> Any:
    """Averages over the cells of a 32 x 32 grid, 0 to 1."""
    height, width = picture.shape[:2]
    rows, columns = (np.linspace(0, length, 33).astype(int) for length in (height, width))
    values = picture.astype(np.float64) / 255
    values = np.add.reduceat(values, rows[:-1], axis=0) / np.maximum(1, np.diff(rows))[:, None, None]
    return np.add.reduceat(values, columns[:-1], axis=1) / np.maximum(1, np.diff(columns))[None, :, None]
