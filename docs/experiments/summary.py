"""The table and the figure of docs/results.md from the runs of main-job.sh.

python docs/experiments/summary.py FOLDER [FIGURE.png]
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

COMPONENTS = {"text-encoder": "#c2410c", "unet": "#1d4ed8", "both": "#15803d"}


def evaluations(run: Path) -> list[dict[str, Any]]:
    """The measurements of a run, in order."""
    return [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]


def interval(values: dict[str, float]) -> str:
    """`+0.53 ± 0.10`."""
    return f"{values['mean']:+.2f} ± {(values['high'] - values['low']) / 2:.2f}"


def table(folder: Path) -> str:
    """A Markdown table: one line a run, and the mean of the seeds."""
    lines = [
        "| trained | seed | images | base | tuned | difference (64 pairs) | seen animals (32) | unseen animals (32) |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for component in COMPONENTS:
        differences = []
        for run in sorted(folder.glob(f"{component}-[0-9]*/")):
            last = evaluations(run)[-1]
            differences.append(last["difference"]["mean"])
            cells = [
                component,
                run.name.rpartition("-")[2],
                last["images"],
                f"{last['base_mean']:.2f}",
                f"{last['mean']:.2f}",
            ]
            cells += [interval(last[name]) for name in ("difference", "seen", "unseen")]
            lines.append("| " + " | ".join(map(str, cells)) + " |")
        if differences:
            spread = f"{np.mean(differences):+.2f} (seeds {min(differences):+.2f} to {max(differences):+.2f})"
            lines.append(f"| **{component}** | **mean of {len(differences)}** | | | | **{spread}** | | |")
    return "\n".join(lines)


def figure(folder: Path, path: Path) -> None:
    """The held-out difference over images: a thin line a seed, a thick one their mean."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(7.5, 4.2), layout="constrained")
    axes = made.subplots()
    for component, colour in COMPONENTS.items():
        runs = [evaluations(run) for run in sorted(folder.glob(f"{component}-[0-9]*/"))]
        curves = [[(0, 0.0), *((e["images"], e["difference"]["mean"]) for e in run)] for run in runs]
        for curve in curves:
            axes.plot(*zip(*curve), color=colour, linewidth=0.8, alpha=0.5)
        if curves:
            images = [point[0] for point in curves[0]]
            mean = np.mean([[point[1] for point in curve] for curve in curves], axis=0)
            axes.plot(images, mean, color=colour, linewidth=2.4, marker="o", markersize=4, label=component)
    axes.axhline(0, color="#57534e", linewidth=0.8)
    axes.set_xlabel("images")
    axes.set_ylabel("kB above the base, held-out pairs")
    axes.set_title("jpeg-incompressibility on the embedded model, three seeds", fontsize=11)
    axes.legend(frameon=False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.spines[["top", "right"]].set_visible(False)
    made.savefig(path, dpi=110)


if __name__ == "__main__":
    print(table(Path(sys.argv[1])))
    if len(sys.argv) > 2:
        figure(Path(sys.argv[1]), Path(sys.argv[2]))
