"""The table of budget.sh: where the default preset and `fast` end, and after how many images `fast` is first as good.

python docs/experiments/budget.py FOLDER
"""

from __future__ import annotations

import sys
from pathlib import Path

from evaluation import row
from summary import evaluations

SEEDS = ("100", "101", "102", "103")
BUDGETS = ("3840", "5120", "6400")


def gains(run: Path) -> list[tuple[int, float]]:
    """(images, held-out difference) after every epoch."""
    return [(one["images"], one["difference"]["mean"]) for one in evaluations(run)]


def table(folder: Path) -> str:
    """A Markdown table: a line a seed; `fast` as where it ends, and the images after which it is at the default's end."""
    heads = ["seed", "default, 6,400 images", *(f"fast, {int(budget):,}" for budget in BUDGETS)]
    lines = [row(*heads), "|---" * len(heads) + "|"]
    for seed in SEEDS:
        goal = gains(folder / f"tiny-6400-{seed}")[-1][1]
        cells = [seed, f"{goal:+.2f}"]
        for budget in BUDGETS:
            found = gains(folder / f"fast-{budget}-{seed}")
            reached = next((f"there after {images:,}" for images, gain in found if gain >= goal), "never there")
            cells.append(f"{found[-1][1]:+.2f}, {reached}")
        lines.append(row(*cells))
    return "\n".join(lines)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
