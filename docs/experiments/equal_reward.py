"""The checkpoints that equal-reward.sh compares, and what is made of its evaluations.

    python docs/experiments/equal_reward.py choose MAIN FOLDER SEED...          FOLDER/SEED.toml: the variants of a seed
    python docs/experiments/equal_reward.py report FOLDER FIGURE.png SEED...

The rule, for each seed: the target is the smaller of the last held-out gains of its text-encoder run and its U-Net run; of
each of the two, the saved checkpoint whose measured held-out gain is nearest to the target is taken, of equally near ones the
earlier. `combination` is both of these with weight 1, `combination-half` with weight 0.5 each, which is the same strength in
all. `half-way-...` are the same four for half of that target. `joint` is the last checkpoint of the run that trains both,
`fusion` the last ones of the text encoder and of the U-Net with weight 1 each.

Intervals are the 95 % ones of `texforce eval`, over prompts (the seeds of a prompt are averaged first: they are not
independent); those of a mean over runs are the same, of each prompt's change averaged over the runs.
"""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from evaluation import NOISE, SPLITS, Evaluation, changed, row, shown
from summary import evaluations

METRICS = {"jpeg-incompressibility": 2, "tiny-clip": 3, "tiny-judge": 3, "diversity": 3}
"""With the digits that are shown."""
HEADS = ("kB", "tiny-clip", "tiny-judge", "diversity")
VARIANTS = {
    "base": ("base", "#1c1917"),
    "half-way-text-encoder": ("text encoder,\nhalf way", "#fdba74"),
    "half-way-unet": ("U-Net,\nhalf way", "#93c5fd"),
    "half-way-combination-half": ("half each,\nhalf way", "#fde047"),
    "half-way-combination": ("both,\nhalf way", "#d8b4fe"),
    "text-encoder": ("text encoder", "#c2410c"),
    "unet": ("U-Net", "#1d4ed8"),
    "combination-half": ("half each", "#a16207"),
    "combination": ("both", "#7e22ce"),
    "joint": ("trained\ntogether", "#15803d"),
    "fusion": ("both,\nthe last", "#be185d"),
}
PAIRS = (
    ("half-way-text-encoder", "half-way-unet"),
    ("half-way-combination-half", "half-way-text-encoder"),
    ("half-way-combination", "half-way-text-encoder"),
    ("text-encoder", "unet"),
    ("combination-half", "text-encoder"),
    ("combination", "text-encoder"),
    ("fusion", "joint"),
)


@dataclass(frozen=True)
class Checkpoint:
    """A saved epoch of a run, with its held-out gain."""

    run: Path
    epoch: int
    gain: float

    def __str__(self) -> str:
        return str(self.run / "checkpoints" / f"epoch_{self.epoch:04d}")


def measured(run: Path) -> list[Checkpoint]:
    """Of a finished run, in order, the epochs that were saved and measured."""
    record = run / "run.json"
    if not record.is_file() or json.loads(record.read_text(encoding="utf-8"))["status"] != "finished":
        raise SystemExit(f"the run '{run}' is not finished; run main-job.sh, or texforce train --resume {run}")
    saved = {int(path.name[6:]) for path in (run / "checkpoints").glob("epoch_*")}
    rows = [row for row in evaluations(run) if row["epoch"] in saved]
    return [Checkpoint(run, row["epoch"], row["difference"]["mean"]) for row in rows]


def nearest(checkpoints: Sequence[Checkpoint], target: float) -> Checkpoint:
    """The one whose gain is nearest to the target; the earlier of equally near ones."""
    # gains are multiples of 1/64 byte: rounded, equal distances are equal
    return min(checkpoints, key=lambda one: (round(abs(one.gain - target), 9), one.epoch))


def compared(arms: Mapping[str, Sequence[Checkpoint]], target: float, prefix: str = "") -> dict[str, list[str]]:
    """The text encoder and the U-Net where they are nearest to a gain, and both together: variant -> LoRAs."""
    text_encoder, unet = nearest(arms["text-encoder"], target), nearest(arms["unet"], target)
    return {
        f"{prefix}text-encoder": [f"{text_encoder}"],
        f"{prefix}unet": [f"{unet}"],
        f"{prefix}combination-half": [f"{text_encoder}:0.5", f"{unet}:0.5"],
        f"{prefix}combination": [f"{text_encoder}", f"{unet}"],
    }


def choose(main: Path, folder: Path, seeds: Sequence[str]) -> str:
    """Write the variants of every seed; a Markdown table of what was chosen."""
    heads = (
        "seed",
        "target",
        "text encoder: epoch",
        "its gain",
        "U-Net: epoch",
        "its gain",
        "last gains: text encoder, U-Net, both",
    )
    lines = [row(*heads), "|---" * len(heads) + "|"]
    for seed in seeds:
        arms = {name: measured(main / f"{name}-{seed}") for name in ("text-encoder", "unet", "both")}
        last = {name: checkpoints[-1] for name, checkpoints in arms.items()}
        target = min(last["text-encoder"].gain, last["unet"].gain)
        loras: dict[str, list[str]] = {
            "base": [],
            **compared(arms, target / 2, "half-way-"),
            **compared(arms, target),
            "joint": [f"{last['both']}"],
            "fusion": [f"{last['text-encoder']}", f"{last['unet']}"],
        }
        tables = [
            f'[[variants]]\nname = "{name}"\nmodel = "tiny"\nloras = {json.dumps(own, ensure_ascii=False)}\n'
            for name, own in loras.items()
        ]
        (folder / f"{seed}.toml").write_text("\n".join(tables), encoding="utf-8")
        for gain in (target / 2, target):
            cells = [seed, f"{gain:+.3f}"]
            for one in (nearest(arms[name], gain) for name in ("text-encoder", "unet")):
                cells += [str(one.epoch), f"{one.gain:+.3f}"]
            cells.append(", ".join(f"{one.gain:+.3f}" for one in last.values()) if gain == target else "")
            lines.append(row(*cells))
    return "\n".join(lines)


def table(runs: Mapping[str, Sequence[Evaluation]], pairs: Sequence[tuple[str, str]], first: str) -> str:
    """A Markdown table: for each pair of variants, group of runs and split, the change of every metric."""
    one = next(iter(runs.values()))[0]
    lines = [row(first, "seed", "prompts", *HEADS), "|---" * (3 + len(HEADS)) + "|"]
    for variant, against in pairs:
        name = variant if against == "base" else f"{variant} − {against}"
        for split in SPLITS:
            for label, of_label in runs.items():
                cells = [shown(changed(of_label, m, variant, against, split), digits) for m, digits in METRICS.items()]
                lines.append(row(name, label, f"{split} ({len(one.splits[split])})", *cells))
    return "\n".join(lines)


def bases(one: Evaluation) -> str:
    """A sentence: what the base's pictures have, which are the same for every seed of training."""
    parts = []
    for split in SPLITS:
        values = {m: [one.by_prompt(m, "base")[prompt] for prompt in one.splits[split]] for m in METRICS}
        cells = [f"{head} {np.mean(values[m]):.{METRICS[m]}f}" for head, m in zip(HEADS, METRICS)]
        parts.append(f"{split}: {', '.join(cells)}")
    return f"The base has {'; '.join(parts)}."


def figure(runs: Mapping[str, Evaluation], path: Path) -> None:
    """Above: the first seen and the first unseen prompt, the same noise for every variant, the kB of each picture below it.
    Below: what a judge says along the reward, a point a variant and seed."""
    from matplotlib.figure import Figure

    shown_rows = [(seed, run, run.splits[split][0]) for seed, run in runs.items() for split in SPLITS]
    made = Figure(figsize=(14, 1.4 * len(shown_rows) + 3.6), layout="constrained")
    above, below = made.subfigures(2, 1, height_ratios=(1.4 * len(shown_rows), 3.6))
    cells = above.subplots(len(shown_rows), len(VARIANTS))
    for i, (line, (seed, run, prompt)) in enumerate(zip(cells, shown_rows)):
        for cell, (variant, (title, _)) in zip(line, VARIANTS.items()):
            cell.imshow(run.picture(variant, prompt, NOISE), interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            cell.set_xlabel(f"{run.values['jpeg-incompressibility', variant][prompt][str(NOISE)]:.2f} kB", fontsize=8)
            if i == 0:
                cell.set_title(title, fontsize=9)
            if variant == "base":
                cell.set_ylabel(f"{prompt}\nseed {seed}", fontsize=8)
    axes = below.subplots()
    for variant, (title, colour) in VARIANTS.items():
        for (seed, run), marker in zip(runs.items(), itertools.cycle("os^Dv*")):
            x, y = (_mean(run, metric, variant) for metric in ("jpeg-incompressibility", "tiny-judge"))
            label = title.replace("\n", " ") if seed == next(iter(runs)) else None
            axes.plot(x, y, marker, color=colour, markersize=6, alpha=0.85, label=label)
    axes.set_xlabel("kB of the JPEG file, all prompts")
    axes.set_ylabel("tiny-judge, not trained on")
    axes.set_title(f"seed {', '.join(f'{s} {m}' for s, m in zip(runs, itertools.cycle('○□△◇▽☆')))}", fontsize=9)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    made.savefig(path, dpi=110)


def _mean(run: Evaluation, metric: str, variant: str) -> Any:
    return np.mean(list(run.by_prompt(metric, variant).values()))


def report(folder: Path, path: Path, seeds: Sequence[str]) -> None:
    """The tables on stdout: means of the seeds, pairs of variants, each seed; and the figure."""
    runs = {seed: Evaluation.read(folder / seed) for seed in seeds}
    mean = {f"mean of {len(runs)}": list(runs.values())}
    each = {seed: [run] for seed, run in runs.items()}
    against_base = [(variant, "base") for variant in VARIANTS if variant != "base"]
    print(bases(runs[seeds[0]]), end="\n\n")
    print(table(mean, against_base, "above the base"), end="\n\n")
    print(table(mean | each, PAIRS, "difference"), end="\n\n")
    print(table(each, against_base, "above the base"))
    figure(runs, path)


if __name__ == "__main__":
    command, first, second, *seeds = sys.argv[1:]
    if command == "choose":
        print(choose(Path(first), Path(second), seeds))
    else:
        report(Path(first), Path(second), seeds)
