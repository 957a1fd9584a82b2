"""The tables and the figures of capabilities.sh: what training the text encoder, the U-Net, and both put together change.

    python docs/experiments/capabilities.py FOLDER BARS.png PICTURES.png

Changes from the base with the same prompts and noise, with the 95 % intervals of `texforce eval` over prompts (the seeds of a
prompt are averaged first: they are not independent); those of a mean over runs are the same, of each prompt's change averaged
over the runs.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from evaluation import NOISE, SEEDS, SPLITS, Evaluation, changed, row, shown

SETS = ("color", "count", "composition", "location")
METRICS = ("tiny-clip", "tiny-judge")
VARIANTS = {"base": "base", "texforce": "text encoder", "ddpo": "U-Net", "both": "both"}
COLOURS = {"texforce": "#c2410c", "ddpo": "#1d4ed8", "both": "#7e22ce"}
AGAINST_BASE = (("texforce", "base"), ("ddpo", "base"), ("both", "base"))
PAIRS = (("texforce", "ddpo"), ("both", "texforce"), ("both", "ddpo"))
COLUMNS = [(split, metric) for split in SPLITS for metric in METRICS]

Runs = Mapping[str, Mapping[str, Evaluation]]
"""Set -> seed -> evaluation."""


def table(runs: Runs, pairs: Sequence[tuple[str, str]], first: str, *, seeds: bool) -> str:
    """A Markdown table: for each set and pair of variants the mean of the seeds, or a line a seed."""
    counts = {split: len(next(iter(runs[SETS[0]].values())).splits[split]) for split in SPLITS}
    heads = [f"{metric}, {split} ({counts[split]})" for split, metric in COLUMNS]
    lines = [row("prompts", first, "seed", *heads), "|---" * (3 + len(heads)) + "|"]
    for name, of_set in runs.items():
        groups = {seed: [run] for seed, run in of_set.items()} if seeds else {"mean": list(of_set.values())}
        digits = 3 if seeds else 4
        for variant, against in pairs:
            about = variant if against == "base" else f"{variant} − {against}"
            for label, group in groups.items():
                cells = [shown(changed(group, m, variant, against, s), digits) for s, m in COLUMNS]
                lines.append(row(name, about, label, *cells))
    return "\n".join(lines)


def bases(runs: Runs) -> str:
    """A Markdown table: what the base's pictures have, which are the same for every seed of training."""
    lines = [row("base", *(f"{metric}, {split}" for split, metric in COLUMNS)), "|---" * (1 + len(COLUMNS)) + "|"]
    for name, of_set in runs.items():
        one = next(iter(of_set.values()))
        means = [np.mean([one.by_prompt(m, "base")[prompt] for prompt in one.splits[s]]) for s, m in COLUMNS]
        lines.append(row(name, *(f"{mean:.3f}" for mean in means)))
    return "\n".join(lines)


def bars(runs: Runs, path: Path) -> None:
    """The mean change of each set and variant with its interval, and a point a seed; a row a split, a column a judge."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(10, 6.6), layout="constrained")
    for axes, (split, metric) in zip(made.subplots(2, 2, sharey="row").flat, COLUMNS):
        for i, (variant, colour) in enumerate(COLOURS.items()):
            x = np.arange(len(SETS)) + 0.26 * (i - 1)
            found = [changed(list(runs[name].values()), metric, variant, "base", split) for name in SETS]
            errors = ([one.mean - one.low for one in found], [one.high - one.mean for one in found])
            heights = [one.mean for one in found]
            axes.bar(x, heights, 0.24, color=colour, alpha=0.55, label=VARIANTS[variant])
            axes.errorbar(x, heights, errors, fmt="none", color=colour, capsize=3, linewidth=1.2)
            for j, seed in enumerate(SEEDS):
                points = [changed([runs[name][seed]], metric, variant, "base", split).mean for name in SETS]
                axes.plot(x + 0.06 * (j - 1), points, ".", color="#1c1917", markersize=4)
        axes.axhline(0, color="#57534e", linewidth=0.8)
        axes.set_xticks(range(len(SETS)), SETS)
        judge = "the reward" if metric == "tiny-clip" else "not trained on"
        axes.set_title(f"{metric} ({judge}) above the base, {split} prompts", fontsize=10)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    made.legend(
        *made.axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False, fontsize=9
    )
    made.savefig(path, dpi=110)


def pictures(runs: Runs, path: Path) -> None:
    """The first seen and the first unseen prompt of each set, the same noise for every variant, the first seed of training."""
    from matplotlib.figure import Figure

    columns = [(runs[name][SEEDS[0]], split) for name in SETS for split in SPLITS]
    made = Figure(figsize=(1.35 * len(columns), 1.4 * len(VARIANTS) + 0.5), layout="constrained")
    cells = made.subplots(len(VARIANTS), len(columns))
    for line, (variant, title) in zip(cells, VARIANTS.items()):
        for j, (cell, (run, split)) in enumerate(zip(line, columns)):
            prompt = run.splits[split][0]
            cell.imshow(run.picture(variant, prompt, NOISE), interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            if variant == "base":
                cell.set_title(textwrap.fill(prompt, 15) + f"\n({split})", fontsize=8)
            if j == 0:
                cell.set_ylabel(title, fontsize=9)
    made.savefig(path, dpi=110)


def main(folder: Path, bars_path: Path, pictures_path: Path) -> None:
    """The tables on stdout: means of the seeds, pairs of variants, each seed; and both figures."""
    runs = {name: {seed: Evaluation.read(folder / f"{name}-{seed}") for seed in SEEDS} for name in SETS}
    print(bases(runs), end="\n\n")
    print(table(runs, AGAINST_BASE, "above the base", seeds=False), end="\n\n")
    print(table(runs, PAIRS, "difference", seeds=False), end="\n\n")
    print(table(runs, AGAINST_BASE, "above the base", seeds=True))
    bars(runs, bars_path)
    pictures(runs, pictures_path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
