"""The table and the figure of backbones.sh: what training the text encoder changes on two backbones.

    python docs/experiments/backbones.py FIRST SECOND FIGURE.png
    python docs/experiments/backbones.py docs/experiments/capabilities docs/experiments/backbones docs/images/backbones.png

FIRST and SECOND hold the files SET-SEED.json of capabilities.sh and of backbones.sh, and seeds are shown of which both have all sets.

Changes from each backbone's own base with the same prompts and noise; intervals as in capabilities.py. The difference of two
backbones' changes is taken prompt by prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from evaluation import COLUMNS, SETS, Evaluation, Series, bars, changed, row, shown, whole

from texforce_cli.core.comparison import interval

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
                f"{of_set[name][0].mean(m, 'base', s):.3f} {shown(changed(of_set[name], m, 'texforce', 'base', s), 4)}"
                for s, m in COLUMNS
            ]
            lines.append(row(name, backbone, *cells))
        found = [shown(interval(list(apart(runs, name, m, s))), 4) for s, m in COLUMNS]
        lines.append(row(name, "difference", *found))
    return "\n".join(lines)


def apart(runs: Runs, name: str, metric: str, split: str) -> Sequence[float]:
    """How much more the second backbone has changed than the first, a value a prompt."""
    means = []
    for of_set in runs.values():
        changes = [run.change(metric, "texforce", "base", split) for run in of_set[name]]
        means.append({prompt: float(np.mean([change[prompt] for change in changes])) for prompt in changes[0]})
    first, second = means
    return [second[prompt] - first[prompt] for prompt in first]


def figure(runs: Runs, path: Path) -> None:
    """The mean change of each set and backbone."""
    named = {name: f"the network predicts {name}" for name in BACKBONES}
    bars([Series(named[n], c, "texforce", runs[n]) for n, c in BACKBONES.items()], "own base", path)


def main(first: Path, second: Path, path: Path) -> None:
    """The table on stdout, and the figure."""
    folders = first, second
    seeds = whole(*folders)
    runs = {
        backbone: {name: [Evaluation.read_means(folder / f"{name}-{seed}") for seed in seeds] for name in SETS}
        for backbone, folder in zip(BACKBONES, folders)
    }
    print(table(runs))
    figure(runs, path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
