"""Honest intervals for small samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats


@dataclass(frozen=True)
class Interval:
    """A mean with its two-sided 95 % confidence interval, over `n` values."""

    mean: float
    low: float
    high: float
    n: int

    @property
    def half_width(self) -> float:
        """Half the width of the interval."""
        return (self.high - self.low) / 2


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student 95 % interval of two or more independent values.

    Raises:
        ValueError: fewer than two values have no interval.
    """
    array = np.asarray(values, dtype=np.float64)
    n, mean = len(array), float(array.mean())
    if n < 2:
        raise ValueError(f"{n} values have no interval")
    half = float(stats.t.ppf(0.975, n - 1)) * float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_interval(after: Sequence[float], before: Sequence[float]) -> Interval:
    """The interval of the mean difference `after - before` of values that belong together (same prompt, same noise)."""
    return mean_interval(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64))  # type: ignore[arg-type]
