"""The table and the figure of fusion.sh: both rewards along the ratio of two LoRAs.

    python docs/experiments/fusion.py FOLDER FIGURE.png

Changes from the base with the same prompt and noise; 95 % intervals over prompts (the seeds of a prompt are averaged
first: they are not independent).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from texforce_cli.core.statistics import Interval, paired_interval
from texforce_cli.rewards.builtin.pictures import Brightness, JpegIncompressibility

RATIOS = ("0", "0.25", "0.5", "0.75", "1")
SEEDS = ("10", "11", "12")
REWARDS = {"brightness": Brightness, "jpeg-incompressibility": JpegIncompressibility}
UNITS = {"brightness": "luminance", "jpeg-incompressibility": "kB"}
COLOURS = {"brightness": "#c2410c", "jpeg-incompressibility": "#1d4ed8"}
SHOWN = ("a cat", "a fox", "a horse")


def scores(folder: Path) -> dict[str, dict[str, float]]:
    """Reward -> prompt -> mean over the seeds."""
    rewards = {name: make() for name, make in REWARDS.items()}
    found: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in rewards}
    for path in sorted(folder.glob("*-seed*.png")):
        with Image.open(path) as picture:
            prompt = picture.text["prompt"]  # type: ignore[attr-defined]
            given = picture.convert("RGB")
        for name, reward in rewards.items():
            images = np.asarray(given)[None] if getattr(reward, "input", "pil") == "uint8" else [given]
            found[name][prompt] += list(reward.score(images, [prompt], [{}]))  # type: ignore[attr-defined]
    return {name: {prompt: float(np.mean(values)) for prompt, values in rows.items()} for name, rows in found.items()}


def changes(folder: Path) -> dict[str, dict[str, dict[str, Interval]]]:
    """Seed -> ratio -> reward -> change from the base."""
    result: dict[str, dict[str, dict[str, Interval]]] = {}
    for seed in SEEDS:
        base = scores(folder / f"pictures-{seed}-base")
        result[seed] = {}
        for ratio in RATIOS:
            tuned = scores(folder / f"pictures-{seed}-{ratio}")
            result[seed][ratio] = {
                name: paired_interval([tuned[name][p] for p in base[name]], [base[name][p] for p in base[name]])
                for name in REWARDS
            }
    return result


def table(found: dict[str, dict[str, dict[str, Interval]]]) -> str:
    """A Markdown table: a line a seed and ratio."""
    lines = ["| seed | share of brightness | brightness | jpeg-incompressibility (kB) |", "|---|---|---|---|"]
    for seed, ratios in found.items():
        for ratio, rows in ratios.items():
            cells = [f"{rows[name].mean:+.3f} ± {rows[name].half_width:.3f}" for name in REWARDS]
            lines.append(f"| {seed} | {ratio} | {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(found: dict[str, dict[str, dict[str, Interval]]], folder: Path, path: Path) -> None:
    """Above: both rewards along the ratio, a line a seed. Below: the same noise at every ratio, of the first seed."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(9, 7.4), layout="constrained")
    above, below = made.subfigures(2, 1, height_ratios=(1, 1.1))
    x = [float(ratio) for ratio in RATIOS]
    for axes, name in zip(above.subplots(1, 2), REWARDS):
        for seed in SEEDS:
            rows = [found[seed][ratio][name] for ratio in RATIOS]
            means, widths = [row.mean for row in rows], [row.half_width for row in rows]
            axes.errorbar(x, means, widths, color=COLOURS[name], marker="o", markersize=4, capsize=3, alpha=0.7)
        axes.axhline(0, color="#57534e", linewidth=0.8)
        axes.set_xlabel("share of the LoRA for brightness")
        axes.set_ylabel(f"{UNITS[name]} above the base")
        axes.set_title(name, fontsize=11)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    cells = below.subplots(len(SHOWN), len(RATIOS) + 1)
    for row, prompt in zip(cells, SHOWN):
        for cell, variant in zip(row, ("base", *RATIOS)):
            slug = prompt.replace(" ", "-")
            picture = next((folder / f"pictures-{SEEDS[0]}-{variant}").glob(f"*-{slug}-seed1000.png"))
            cell.imshow(Image.open(picture), interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            if prompt == SHOWN[0]:
                cell.set_title(variant, fontsize=9)
            if variant == "base":
                cell.set_ylabel(prompt, fontsize=9)
    made.savefig(path, dpi=110)


def main(folder: Path, path: Path) -> None:
    """The command."""
    found = changes(folder)
    print(table(found))
    plain: dict[str, Any] = {
        seed: {ratio: {n: [i.mean, i.low, i.high] for n, i in rows.items()} for ratio, rows in ratios.items()}
        for seed, ratios in found.items()
    }
    (folder / "fusion.json").write_text(json.dumps(plain, indent=2) + "\n", encoding="utf-8")
    figure(found, folder, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
