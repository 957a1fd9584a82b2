"""How often the 95 % interval of `texforce eval` holds the true difference, beside two that are common.

    python -m benchmarks.coverage --out benchmarks/results/coverage.json

takes some ten minutes; with its 10,000 trials a coverage of 95 % is known to within 0.5 %, as `+-` says.

Simulated evaluations: prompts differ much (deviation 2), pictures of one prompt less (1), the effect of a variant differs
from prompt to prompt (deviation 0.5, symmetric or skewed) around a true mean of 0.2; 4 seeds. `prompts` is the interval of
`texforce eval`, made as it makes it, of every picture's score; `pictures` takes every pair of pictures for independent;
`unpaired` compares two means.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np

from texforce_cli.core.comparison import ByPrompt, compare
from texforce_cli.core.statistics import mean_interval
from texforce_cli.files import write_json

TRUE, SEEDS = 0.2, 4


def simulate(rng: np.random.Generator, prompts: int, skewed: bool) -> tuple[np.ndarray, np.ndarray]:
    """Scores [prompts, seeds] of the baseline and of the variant; the noise of a seed is shared by half."""
    level = rng.normal(0, 2, (prompts, 1))
    effect = rng.exponential(0.5, (prompts, 1)) - 0.5 if skewed else rng.normal(0, 0.5, (prompts, 1))
    shared = rng.normal(0, 0.7, (prompts, SEEDS))
    base, tuned = (level + shared + rng.normal(0, 0.7, (prompts, SEEDS)) for _ in range(2))
    return base, tuned + TRUE + effect


def by_prompt(scores: np.ndarray) -> ByPrompt:
    """As `texforce eval` compares them."""
    return {str(number): row for number, row in enumerate(scores.tolist())}


def coverage(prompts: int, skewed: bool, trials: int) -> dict[str, dict[str, float]]:
    """Share of trials in which each interval holds the truth, and its mean width."""
    rng = np.random.default_rng(prompts + skewed)
    hits: dict[str, list[bool]] = {}
    widths: dict[str, list[float]] = {}
    for _ in range(trials):
        base, tuned = simulate(rng, prompts, skewed)
        difference = tuned - base
        spread = (base.mean(1).var(ddof=1) / prompts + tuned.mean(1).var(ddof=1) / prompts) ** 0.5
        found = {
            "prompts": compare(by_prompt(tuned), by_prompt(base)).difference,
            "pictures": mean_interval(difference.ravel().tolist()),
        }
        bounds = {name: (i.low, i.high) for name, i in found.items()}
        bounds["unpaired"] = (difference.mean() - 1.96 * spread, difference.mean() + 1.96 * spread)
        for name, (low, high) in bounds.items():
            hits.setdefault(name, []).append(bool(low <= TRUE <= high))
            widths.setdefault(name, []).append(float(high - low))
    return {name: _row(float(np.mean(hits[name])), trials, float(np.mean(widths[name]))) for name in hits}


def _row(share: float, trials: int, width: float) -> dict[str, float]:
    likely = (share * trials + 2) / (trials + 4)  # Agresti and Coull 1998: above zero even where every trial hits
    half = 1.96 * (likely * (1 - likely) / (trials + 4)) ** 0.5
    return {"coverage": round(share, 4), "+-": round(half, 4), "mean width": round(width, 3)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=10_000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    report = {
        f"{prompts} prompts, {'skewed' if skewed else 'symmetric'}": coverage(prompts, skewed, options.trials)
        for prompts in (8, 20, 100)
        for skewed in (False, True)
    }
    print(json.dumps(report, indent=2))
    if options.out:
        write_json(options.out, {"trials": options.trials, **report})


if __name__ == "__main__":
    main()
