"""Honest intervals for small samples."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_T_975 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145, 2.131)
"""Student's t, 97.5 % quantile, for 1 to 15 degrees of freedom."""


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


def t_quantile(degrees: int) -> float:
    """Student's 97.5 % quantile: a table to 15 degrees, then Cornish-Fisher's expansion (error below 1e-3)."""
    if degrees <= len(_T_975):
        return _T_975[degrees - 1]
    z = 1.959964
    return z + (z**3 + z) / (4 * degrees) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * degrees**2)


def mean_interval(values: Sequence[float]) -> Interval:
    """Mean and Student 95 % interval of two or more independent values.

    Raises:
        ValueError: fewer than two values have no interval.
    """
    array = np.asarray(values, dtype=np.float64)
    n, mean = len(array), float(array.mean())
    if n < 2:
        raise ValueError(f"{n} values have no interval")
    half = t_quantile(n - 1) * float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def paired_interval(after: Sequence[float], before: Sequence[float]) -> Interval:
    """The interval of the mean difference `after - before` of values that belong together (same prompt, same noise)."""
    return mean_interval(np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64))  # type: ignore[arg-type]
