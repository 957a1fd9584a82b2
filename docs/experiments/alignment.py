"""Both judges on the pictures of alignment.sh, and what is made of their scores.

    python docs/experiments/alignment.py score SET FOLDER...        one JSON line a folder of pictures
    python docs/experiments/alignment.py report SCORES.jsonl RUNS FIGURE.png

A line holds the change of each judge's score from base to tuned on seen and unseen prompts, with the paired 95 % interval
over prompts (the seeds of a prompt are averaged first: they are not independent), and the change of every prompt. The report's
mean of a set is the same interval of the changes averaged over its runs.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from texforce_cli.core.statistics import mean_interval, paired_interval
from texforce_cli.prompts import load_prompts
from texforce_cli.rewards.builtin.emoji import TinyClip, TinyJudge

SETS = ("color", "count", "composition", "location")
JUDGES = {"TinyClip": "tiny-clip", "TinyJudge": "tiny-judge"}
COLOURS = ("#c2410c", "#1d4ed8", "#15803d", "#7e22ce")


def change(folder: Path, prompt_set: str) -> dict[str, Any]:
    """Judge -> split -> base mean, tuned mean, difference, half width of its interval, and the difference by prompt."""
    splits = load_prompts(prompt_set, "tiny")
    result: dict[str, Any] = {"set": prompt_set, "folder": folder.name}
    pictures = []
    for path in sorted(folder.glob("*-seed*.png")):
        with Image.open(path) as picture:
            prompt = picture.text["prompt"]  # type: ignore[attr-defined]
            pictures.append((prompt, path.stem.rpartition("-")[2], np.asarray(picture.convert("RGB"))))
    for judge in (TinyClip(), TinyJudge()):
        scores: dict[tuple[str, str], list[float]] = defaultdict(list)
        for start in range(0, len(pictures), 64):
            texts, variants, images = zip(*pictures[start : start + 64])
            values = judge.score(np.stack(images), texts, [{}] * len(texts))
            for text, variant, value in zip(texts, variants, values):
                scores[text, variant].append(value)
        rows = {}
        for name, prompts in (("seen", splits.seen), ("unseen", splits.unseen)):
            base, tuned = ([float(np.mean(scores[p.text, v])) for p in prompts] for v in ("base", "tuned"))
            interval = paired_interval(tuned, base)
            rows[name] = {
                "prompts": len(base),
                "base": round(float(np.mean(base)), 4),
                "tuned": round(float(np.mean(tuned)), 4),
                "difference": round(interval.mean, 4),
                "half_width": round(interval.half_width, 4),
                "by_prompt": {p.text: round(b - a, 4) for p, a, b in zip(prompts, base, tuned)},
            }
        result[type(judge).__name__] = rows
    return result


def table(lines: Sequence[dict[str, Any]]) -> str:
    """A Markdown table: a line a run, and for each set how many of its intervals lie above zero."""
    columns = [(judge, split) for split in ("seen", "unseen") for judge in JUDGES]
    counts = {split: lines[0]["TinyClip"][split]["prompts"] for split in ("seen", "unseen")}
    heads = [f"{JUDGES[judge]}, {split} ({counts[split]})" for judge, split in columns]
    rows = [f"| prompts | seed | {' | '.join(heads)} |", "|---" * (2 + len(heads)) + "|"]
    for name in SETS:
        of_set = [line for line in lines if line["set"] == name]
        for line in of_set:
            cells = [line[judge][split] for judge, split in columns]
            shown = [f"{cell['difference']:+.3f} ± {cell['half_width']:.3f}" for cell in cells]
            rows.append(f"| {name} | {line['folder'].split('-')[1]} | {' | '.join(shown)} |")
        if of_set:
            above = [sum(line[j][s]["difference"] > line[j][s]["half_width"] for line in of_set) for j, s in columns]
            both = [mean_interval(_of_all([line[j][s]["by_prompt"] for line in of_set])) for j, s in columns]
            summary = [
                f"{one.mean:+.4f} ± {one.half_width:.4f}; {n} of {len(of_set)} above 0" for one, n in zip(both, above)
            ]
            rows.append(f"| **{name}** | **mean** | {' | '.join(f'**{text}**' for text in summary)} |")
    return "\n".join(rows)


def _of_all(runs: Sequence[dict[str, float]]) -> list[float]:
    """The change of each prompt, the mean over runs."""
    return [float(np.mean([run[prompt] for run in runs])) for prompt in runs[0]]


def figure(lines: Sequence[dict[str, Any]], runs: Path, path: Path) -> None:
    """Held-out reward over images, a line a run (left); what each judge says at the end, seen prompts (right)."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = made.subplots(1, 2)
    for name, colour in zip(SETS, COLOURS):
        for i, run in enumerate(sorted(runs.glob(f"{name}-[0-9]*/evaluations.jsonl"))):
            rows = [json.loads(line) for line in run.read_text().splitlines()]
            points = [(0, 0.0), *((row["images"], row["difference"]["mean"]) for row in rows)]
            left.plot(*zip(*points), color=colour, linewidth=1.2, alpha=0.8, label=name if i == 0 else None)
        for line in (line for line in lines if line["set"] == name):
            for judge, marker in (("TinyClip", "o"), ("TinyJudge", "s")):
                cell = line[judge]["seen"]
                x = (
                    SETS.index(name)
                    + (0.0 if judge == "TinyClip" else 0.35)
                    + 0.1 * (int(line["folder"].split("-")[1]) - 10)
                )
                right.errorbar(
                    x, cell["difference"], cell["half_width"], fmt=marker, color=colour, markersize=4, capsize=2
                )
    left.set_xlabel("images")
    left.set_title("tiny-clip above the base, held-out pairs", fontsize=10)
    left.legend(frameon=False)
    right.set_xticks([i + 0.25 for i in range(len(SETS))], SETS)
    seeds = len({line["folder"] for line in lines}) // len(SETS)
    right.set_title(f"seen prompts: tiny-clip (o), tiny-judge (□); {seeds} seeds", fontsize=10)
    for axes in (left, right):
        axes.axhline(0, color="#57534e", linewidth=0.8)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    made.savefig(path, dpi=110)


if __name__ == "__main__":
    if sys.argv[1] == "score":
        for folder_name in sys.argv[3:]:
            print(json.dumps(change(Path(folder_name), sys.argv[2])), flush=True)
    else:
        read = [json.loads(line) for line in Path(sys.argv[2]).read_text().splitlines()]
        print(table(read))
        figure(read, Path(sys.argv[3]), Path(sys.argv[4]))
