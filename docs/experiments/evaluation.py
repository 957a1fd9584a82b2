"""The folders of `texforce eval` as capabilities.py, side_by_side.py and equal_reward.py read them, and the changes that they report.

    python docs/experiments/evaluation.py means FOLDER          FOLDER.json: the mean of each prompt, all that the tables are made of
    python docs/experiments/evaluation.py prompts SET FILE      a set of prompts in the words of the embedded model, as --prompts reads it

Intervals are the 95 % ones of `texforce eval`, over prompts (the seeds of a prompt are averaged first: they are not
independent); those of a mean over runs are the same, of each prompt's change averaged over the runs.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from texforce_cli.core.comparison import interval
from texforce_cli.core.statistics import Interval
from texforce_cli.files import write_bytes, write_json
from texforce_cli.prompts import load_prompts
from texforce_cli.workflows.evaluation.pictures import Item, picture_path

SEEDS = ("10", "11", "12")
"""Of training."""
SPLITS = ("seen", "unseen")
SETS = ("color", "count", "composition", "location")
METRICS = ("tiny-clip", "tiny-judge")
COLUMNS = [(split, metric) for split in SPLITS for metric in METRICS]
NOISE = 1000
"""The seed of the pictures that are shown."""


@dataclass(frozen=True)
class Evaluation:
    """A finished folder of `texforce eval`: (metric, variant) -> prompt -> seed -> value, and split -> prompts.

    `diversity`, and everything that was read from FOLDER.json, has one value a prompt, without a seed.
    """

    folder: Path
    values: Mapping[tuple[str, str], Mapping[str, Mapping[str, float]]]
    splits: Mapping[str, tuple[str, ...]]

    @classmethod
    def read(cls, folder: Path) -> Evaluation:
        """From scores.csv; nothing may be missing."""
        found = folder / "summary.json"
        if not found.is_file() or json.loads(found.read_text(encoding="utf-8"))["missing"]:
            raise SystemExit(f"the evaluation '{folder}' is not whole; go on with: texforce eval --out {folder}")
        values: dict[tuple[str, str], dict[str, dict[str, float]]] = {}
        splits: dict[str, dict[str, None]] = {split: {} for split in SPLITS}
        with (folder / "scores.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                of_variant = values.setdefault((row["metric"], row["variant"]), {})
                of_variant.setdefault(row["prompt"], {})[row["seed"]] = float(row["value"])
                splits[row["split"]][row["prompt"]] = None
        return cls(folder, values, {split: tuple(prompts) for split, prompts in splits.items()})

    @classmethod
    def read_means(cls, folder: Path) -> Evaluation:
        """From FOLDER.json, which `write_means` has written."""
        found = json.loads(folder.with_name(folder.name + ".json").read_text(encoding="utf-8"))
        values = {
            (metric, variant): {prompt: {"": value} for prompt, value in means.items()}
            for metric, of_metric in found["means"].items()
            for variant, means in of_metric.items()
        }
        return cls(folder, values, {split: tuple(prompts) for split, prompts in found["splits"].items()})

    def write_means(self) -> None:
        """FOLDER.json: every prompt's mean over its seeds."""
        means: dict[str, dict[str, dict[str, float]]] = {}
        for metric, variant in self.values:
            rounded = {prompt: round(value, 6) for prompt, value in self.by_prompt(metric, variant).items()}
            means.setdefault(metric, {})[variant] = rounded
        file = self.folder.with_name(self.folder.name + ".json")
        write_json(file, {"splits": self.splits, "means": means})

    def by_prompt(self, metric: str, variant: str) -> dict[str, float]:
        """The mean over the seeds of each prompt."""
        return {prompt: float(np.mean(list(own.values()))) for prompt, own in self.values[metric, variant].items()}

    def mean(self, metric: str, variant: str, split: str) -> float:
        """The mean over the prompts of a split."""
        values = self.by_prompt(metric, variant)
        return float(np.mean([values[prompt] for prompt in self.splits[split]]))

    def change(self, metric: str, variant: str, against: str, split: str) -> dict[str, float]:
        """How much larger a variant's value of each prompt is than that of another."""
        ours, theirs = self.by_prompt(metric, variant), self.by_prompt(metric, against)
        return {prompt: ours[prompt] - theirs[prompt] for prompt in self.splits[split]}

    def picture(self, variant: str, prompt: str, seed: int) -> Image.Image:
        """As it was drawn."""
        with Image.open(picture_path(self.folder, variant, Item(prompt, seed))) as picture:
            return picture.convert("RGB")


def whole(*folders: Path) -> list[str]:
    """The seeds of training of which every folder has the means of all sets."""
    return [s for s in SEEDS if all((folder / f"{name}-{s}.json").exists() for folder in folders for name in SETS)]


def changed(runs: Sequence[Evaluation], metric: str, variant: str, against: str, split: str) -> Interval:
    """The change of each prompt, averaged over runs, with its interval over prompts."""
    changes = [run.change(metric, variant, against, split) for run in runs]
    return interval([float(np.mean([change[prompt] for change in changes])) for prompt in changes[0]])


def shown(found: Interval, digits: int) -> str:
    """`+0.53 ± 0.10`."""
    return f"{found.mean:+.{digits}f} ± {found.half_width:.{digits}f}"


def row(*cells: str) -> str:
    """A line of a Markdown table."""
    return f"| {' | '.join(cells)} |"


@dataclass(frozen=True)
class Series:
    """Bars of one colour: how far a variant is above the base, for each set of prompts; `runs` has an evaluation a seed."""

    label: str
    colour: str
    variant: str
    runs: Mapping[str, Sequence[Evaluation]]


def bars(series: Sequence[Series], base: str, path: Path) -> None:
    """The mean change of each set and series with its interval, and a point a seed; a row a split, a column a judge."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(10, 6.6), layout="constrained")
    width = 0.78 / len(series)
    for axes, (split, metric) in zip(made.subplots(2, 2, sharey="row").flat, COLUMNS):
        for i, one in enumerate(series):
            x = np.arange(len(SETS)) + width * (i - (len(series) - 1) / 2)
            found = [changed(one.runs[name], metric, one.variant, "base", split) for name in SETS]
            errors = ([f.mean - f.low for f in found], [f.high - f.mean for f in found])
            axes.bar(x, [f.mean for f in found], 0.92 * width, color=one.colour, alpha=0.55, label=one.label)
            axes.errorbar(x, [f.mean for f in found], errors, fmt="none", color=one.colour, capsize=3, linewidth=1.2)
            for j in range(len(one.runs[SETS[0]])):
                points = [changed([one.runs[name][j]], metric, one.variant, "base", split).mean for name in SETS]
                axes.plot(x + width / 4 * (j - 1), points, ".", color="#1c1917", markersize=4)
        axes.axhline(0, color="#57534e", linewidth=0.8)
        axes.set_xticks(range(len(SETS)), SETS)
        judge = "the reward" if metric == "tiny-clip" else "not trained on"
        axes.set_title(f"{metric} ({judge}) above the {base}, {split} prompts", fontsize=10)
        axes.grid(axis="y", alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    handles = made.axes[0].get_legend_handles_labels()
    made.legend(*handles, loc="outside upper center", ncols=len(series), frameon=False, fontsize=9)
    made.savefig(path, dpi=110)


if __name__ == "__main__":
    if sys.argv[1] == "means":
        Evaluation.read(Path(sys.argv[2])).write_means()
    else:
        write_bytes(Path(sys.argv[3]), load_prompts(sys.argv[2], "tiny").to_jsonl().encode())
