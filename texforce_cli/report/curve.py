"""The curve of a run: the reward of training images, and of held-out pairs with their interval, over images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from texforce_cli.files import atomic_path


def reward_curve(
    rows: Sequence[Mapping[str, Any]],
    path: Path,
    *,
    title: str,
    reward_label: str,
    evaluations: Sequence[Mapping[str, float]] = (),
) -> None:
    """Write a PNG.

    `rows` have images, reward_mean, reward_std, approx_kl; `evaluations` images, mean, low, high and base, the reward
    of the base model on the same pairs.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.5, 5.2), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    images = [row["images"] for row in rows]
    means = [row["reward_mean"] for row in rows]
    top.plot(images, means, color="#8fb3d9", linewidth=1.5, label="training images (mean of an epoch)")
    low, high = ([row["reward_mean"] + sign * row["reward_std"] for row in rows] for sign in (-1, 1))
    top.fill_between(images, low, high, color="#8fb3d9", alpha=0.18, linewidth=0, label="± one standard deviation")
    if evaluations:
        at, mean = ([point[key] for point in evaluations] for key in ("images", "mean"))
        error = [[p["mean"] - p["low"] for p in evaluations], [p["high"] - p["mean"] for p in evaluations]]
        top.errorbar(
            at, mean, yerr=error, color="#c2410c", marker="o", markersize=4, capsize=3, label="held-out pairs, 95 %"
        )
        top.axhline(evaluations[-1]["base"], color="#c2410c", linestyle=":", linewidth=1.2, label="the base on them")
    top.set_title(title, fontsize=11)
    top.set_ylabel(reward_label)
    top.legend(fontsize=8, frameon=False)
    kl = [row["approx_kl"] for row in rows]
    if any(value > 0 for value in kl):
        bottom.semilogy(images, kl, color="#57534e", linewidth=1.2)
    bottom.set_ylabel("approx. KL")
    bottom.set_xlabel("images")
    for axes in (top, bottom):
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        # no version in the file: the same run writes the same bytes
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})
