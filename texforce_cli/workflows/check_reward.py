"""`texforce rewards check`: does a reward load, and what does it say of a picture?"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.report.pictures import read_picture
from texforce_cli.rewards import worker
from texforce_cli.rewards.isolation import WorkerSettings
from texforce_cli.rewards.registry import load_registry
from texforce_cli.rewards.terms import RewardSet, find, parse_terms


@dataclass(frozen=True)
class Check:
    """What came of it; the memory is that of the worker, or of this process where there is none."""

    name: str
    state: str
    score: float
    seconds_to_load: float
    seconds_to_score: float
    memory_mb: float
    counts: Mapping[str, int]
    warnings: tuple[str, ...]


def check_reward(name: str, options: Sequence[str], image: Path | None, prompt: str, timeout: float) -> Check:
    """Load `name` and score `image` (by default a drawn one) with `prompt`, within `timeout` seconds if it is isolated.

    Raises:
        UsageError, TexforceError: what training would say of it.
    """
    terms = parse_terms([name], options)
    registry = load_registry()
    info = find(terms[0], registry)
    try:
        pixels = read_picture(image) if image else _drawn()
    except TexforceError as error:
        raise UsageError(error.message, "check --image") from error
    begun = time.perf_counter()
    rewards = RewardSet(terms, registry, workers=WorkerSettings(timeout, failures=1))
    loaded = time.perf_counter()
    try:
        score = rewards.score(pixels[None], [prompt], [{}])[name]
        done = time.perf_counter()
        memory = sum(rewards.memory().values()) or worker.peak_memory()
        return Check(
            name=name,
            state=info.state,
            score=float(score[0]),
            seconds_to_load=loaded - begun,
            seconds_to_score=done - loaded,
            memory_mb=memory / 1e6,
            counts=rewards.counts(),
            warnings=tuple(rewards.warnings()),
        )
    finally:
        rewards.close()


def _drawn() -> np.ndarray:
    """A picture of the embedded world's kind: a disc on a gradient, uint8 (512, 512, 3)."""
    y, x = np.mgrid[0:512, 0:512] / 511
    picture = np.stack([200 - 60 * y, 205 - 60 * y, 215 - 50 * y], -1)
    picture[(x - 0.5) ** 2 + (y - 0.55) ** 2 < 0.07] = (235, 150, 60)
    return picture.round().astype(np.uint8)
