"""The tables and the figures of capabilities.sh: what training the text encoder, the U-Net, and both put together change.

    python docs/experiments/capabilities.py FOLDER [BARS.png [PICTURES.png]]

FOLDER holds the files SET-SEED.json of capabilities.sh, and seeds are shown of which all sets are there; those of docs/results.md
are kept in docs/experiments/capabilities. The pictures are in the evaluations that lie beside them.

Changes from the base with the same prompts and noise, with the 95 % intervals of `texforce eval` over prompts (the seeds of a
prompt are averaged first: they are not independent); those of a mean over runs are the same, of each prompt's change averaged
over the runs.
"""

from __future__ import annotations

import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path

from evaluation import COLUMNS, NOISE, SEEDS, SETS, SPLITS, Evaluation, Series, bars, changed, row, shown, whole

VARIANTS = {"base": "base", "texforce": "text encoder", "ddpo": "U-Net", "both": "both"}
COLOURS = {"texforce": "#c2410c", "ddpo": "#1d4ed8", "both": "#7e22ce"}
AGAINST_BASE = (("texforce", "base"), ("ddpo", "base"), ("both", "base"))
PAIRS = (("texforce", "ddpo"), ("both", "texforce"), ("both", "ddpo"))

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
        lines.append(row(name, *(f"{one.mean(m, 'base', s):.3f}" for s, m in COLUMNS)))
    return "\n".join(lines)


def shown_bars(runs: Runs, path: Path) -> None:
    """The mean change of each set and variant."""
    bars(
        [Series(VARIANTS[v], c, v, {n: list(runs[n].values()) for n in SETS}) for v, c in COLOURS.items()], "base", path
    )


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


def main(folder: Path, bars_path: Path | None = None, pictures_path: Path | None = None) -> None:
    """The tables on stdout: means of the seeds, pairs of variants, each seed; and both figures."""
    seeds = whole(folder)
    runs = {name: {seed: Evaluation.read_means(folder / f"{name}-{seed}") for seed in seeds} for name in SETS}
    print(bases(runs), end="\n\n")
    print(table(runs, AGAINST_BASE, "above the base", seeds=False), end="\n\n")
    print(table(runs, PAIRS, "difference", seeds=False), end="\n\n")
    print(table(runs, AGAINST_BASE, "above the base", seeds=True))
    if bars_path:
        shown_bars(runs, bars_path)
    if pictures_path:
        pictures(runs, pictures_path)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
