"""The table and the figure of backbones.sh: what training the text encoder changes on two backbones.

    python docs/experiments/backbones.py FIRST SECOND FIGURE.png     (FIRST: the folder of capabilities.sh)

Changes from each backbone's own base with the same prompts and noise; intervals as in capabilities.py. The difference of two
backbones' changes is taken prompt by prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from evaluation import SEEDS, SPLITS, Evaluation, changed, row, shown

from texforce_cli.core.comparison import interval

SETS = ("color", "count", "composition", "location")
METRICS = ("tiny-clip", "tiny-judge")
COLUMNS = [(split, metric) for split in SPLITS for metric in METRICS]
BACKBONES = {"v": "#c2410c", "noise": "#0f766e"}
"""What each predicts, and its colour."""

Runs = Mapping[str, Mapping[str, Sequence[Evaluation]]]
"""Backbone -> set -> evaluations, one a seed."""


def table(runs: Runs) -> str:
    """A Markdown table: the base's mean, and the change with its interval, of each set and backbone; and their difference."""
    lines = [row("prompts", "predicts", *(f"{m}, {s}" for s, m in COLUMNS)), "|---" * (2 + len(COLUMNS)) + "|"]
    for name in SETS:
        for backbone, of_set in runs.items():
            cells = [
                f"{base(of_set[name][0], m, s):.3f} {shown(changed(of_set[name], m, 'texforce', 'base', s), 4)}"
                for s, m in COLUMNS
            ]
            lines.append(row(name, backbone, *cells))
        found = [shown(interval(list(apart(runs, name, m, s))), 4) for s, m in COLUMNS]
        lines.append(row(name, "difference", *found))
    return "\n".join(lines)


def base(run: Evaluation, metric: str, split: str) -> float:
    """The mean of the base's pictures."""
    values = run.by_prompt(metric, "base")
    return float(np.mean([values[prompt] for prompt in run.splits[split]]))


def apart(runs: Runs, name: str, metric: str, split: str) -> Sequence[float]:
    """How much more the second backbone has changed than the first, a value a prompt."""
    means = []
    for of_set in runs.values():
        changes = [run.change(metric, "texforce", "base", split) for run in of_set[name]]
        means.append({prompt: float(np.mean([change[prompt] for change in changes])) for prompt in changes[0]})
    first, second = means
    return [second[prompt] - first[prompt] for prompt in first]


def figure(runs: Runs, path: Path) -> None:
    """The mean change of each set and backbone with its interval, and a point a seed; a row a split, a column a judge."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(10, 6.2), layout="constrained")
    for axes, (split, metric) in zip(made.subplots(2, 2, sharey="row").flat, COLUMNS):
        for i, (backbone, colour) in enumerate(BACKBONES.items()):
            x = np.arange(len(SETS)) + 0.36 * (i - 0.5)
            found = [changed(runs[backbone][name], metric, "texforce", "base", split) for name in SETS]
            errors = ([one.mean - one.low for one in found], [one.high - one.mean for one in found])
            heights = [one.mean for one in found]
            axes.bar(x, heights, 0.33, color=colour, alpha=0.55, label=f"the network predicts {backbone}")
            axes.errorbar(x, heights, errors, fmt="none", color=colour, capsize=3, linewidth=1.2)
            for j in range(len(SEEDS)):
                points = [changed([runs[backbone][name][j]], metric, "texforce", "base", split).mean for name in SETS]
                axes.plot(x + 0.08 * (j - 1), points, ".", color="#1c1917", markersize=4)
        axes.axhline(0, color="#57534e", linewidth=0.8)
        axes.set_xticks(range(len(SETS)), SETS)
        judge = "the reward" if metric == "tiny-clip" else "not trained on"
        axes.set_title(f"{metric} ({judge}) above the own base, {split} prompts", fontsize=10)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    made.legend(
        *made.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=2, frameon=False, fontsize=9
    )
    made.savefig(path, dpi=110)


def main(first: Path, second: Path, path: Path) -> None:
    """The table on stdout, and the figure."""
    runs = {
        backbone: {name: [Evaluation.read(folder / f"{name}-{seed}") for seed in SEEDS] for name in SETS}
        for backbone, folder in zip(BACKBONES, (first, second))
    }
    print(table(runs))
    figure(runs, path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
