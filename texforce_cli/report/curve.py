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
    watched: Mapping[str, Sequence[Mapping[str, float]]] | None = None,
) -> None:
    """Write a PNG; what is watched has a panel of its own.

    `rows` have images, reward_mean, reward_std, approx_kl; `evaluations` images, mean, low, high and base, the reward
    of the base model on the same pairs. `watched`: name -> points with images, mean, low and high, differences to the base.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = {name: points for name, points in (watched or {}).items() if points}
    figure = Figure(figsize=(7.5, 5.2 + 1.6 * bool(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2 + bool(shown), 1, sharex=True, height_ratios=(3, *[1.5] * bool(shown), 1))
    top, bottom = panels[0], panels[-1]
    if shown:
        _watched_panel(panels[1], shown)
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
    top.legend(fontsize=8, framealpha=0.9, edgecolor="none")
    kl = [row["approx_kl"] for row in rows]
    if any(value > 0 for value in kl):
        bottom.semilogy(images, kl, color="#57534e", linewidth=1.2)
    bottom.set_ylabel("approx. KL")
    bottom.set_xlabel("images")
    for axes in panels:
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    with atomic_path(path) as temporary:
        # no version in the file: the same run writes the same bytes
        figure.savefig(temporary, dpi=110, format="png", metadata={"Software": None})


def _watched_panel(axes: Any, watched: Mapping[str, Sequence[Mapping[str, float]]]) -> None:
    axes.axhline(0, color="#57534e", linestyle=":", linewidth=1.2)
    for index, (name, points) in enumerate(watched.items()):
        at, mean = ([point[key] for point in points] for key in ("images", "mean"))
        error = [[p["mean"] - p["low"] for p in points], [p["high"] - p["mean"] for p in points]]
        colour = ("#15803d", "#7e22ce", "#a16207", "#0e7490")[index % 4]
        axes.errorbar(at, mean, yerr=error, color=colour, marker="o", markersize=4, capsize=3, label=name)
    axes.set_ylabel("watched, to base")
    axes.legend(fontsize=8, frameon=False)
