"""The table and the figure of what training the text encoder changes, in two ways: on two backbones, by two presets.

    python docs/experiments/side_by_side.py FIGURE.png LABEL=FOLDER LABEL=FOLDER

The folders hold the files SET-SEED.json that capabilities.sh, backbones.sh and fast.sh leave (those of docs/results.md are kept beside
this file); seeds are shown of which both have all sets.

Changes from each one's own base with the same prompts and noise; intervals as in capabilities.py. The difference of the two
changes is taken prompt by prompt.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from evaluation import COLUMNS, SETS, Evaluation, Series, bars, changed, row, shown, whole

from texforce_cli.core.comparison import interval

COLOURS = ("#c2410c", "#0f766e")

Runs = Mapping[str, Mapping[str, Sequence[Evaluation]]]
"""Label -> set -> evaluations, one a seed."""


def table(runs: Runs) -> str:
    """A Markdown table: the base's mean, and the change with its interval, of each set and label; and their difference."""
    lines = [row("prompts", "", *(f"{m}, {s}" for s, m in COLUMNS)), "|---" * (2 + len(COLUMNS)) + "|"]
    for name in SETS:
        for label, of_set in runs.items():
            cells = [
                f"{of_set[name][0].mean(m, 'base', s):.3f} {shown(changed(of_set[name], m, 'texforce', 'base', s), 4)}"
                for s, m in COLUMNS
            ]
            lines.append(row(name, label, *cells))
        found = [shown(interval(list(apart(runs, name, m, s))), 4) for s, m in COLUMNS]
        lines.append(row(name, "difference", *found))
    return "\n".join(lines)


def apart(runs: Runs, name: str, metric: str, split: str) -> Sequence[float]:
    """How much more the second has changed than the first, a value a prompt."""
    means = []
    for of_set in runs.values():
        changes = [run.change(metric, "texforce", "base", split) for run in of_set[name]]
        means.append({prompt: float(np.mean([change[prompt] for change in changes])) for prompt in changes[0]})
    first, second = means
    return [second[prompt] - first[prompt] for prompt in first]


def main(figure: str, *labelled: str) -> None:
    """The table on stdout, and the figure."""
    folders = {label: Path(folder) for label, _, folder in (one.partition("=") for one in labelled)}
    seeds = whole(*folders.values())
    runs = {
        label: {name: [Evaluation.read_means(folder / f"{name}-{seed}") for seed in seeds] for name in SETS}
        for label, folder in folders.items()
    }
    print(table(runs))
    bars([Series(n, c, "texforce", runs[n]) for n, c in zip(runs, COLOURS, strict=True)], "base", Path(figure))


if __name__ == "__main__":
    main(*sys.argv[1:])
