"""The curve of a hacked reward, from the run of hacking.sh.

    python docs/experiments/hacking.py RUN JUDGED.jsonl FIGURE.png

For the base and every fifth epoch: the reward and both judges' agreement with the prompt, over the same (prompt, seed) pairs.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from texforce_cli import sample
from texforce_cli.prompts import load_prompts
from texforce_cli.rewards.builtin.emoji import TinyClip, TinyJudge
from texforce_cli.rewards.builtin.pictures import JpegIncompressibility

SEEDS = range(1000, 1004)


def judged(run: Path, path: Path) -> list[dict[str, float]]:
    """A line a checkpoint: images learnt from, and the mean of the reward and of both judges."""
    done = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    prompts = [prompt.text for prompt in load_prompts("animals", "tiny").seen]
    per_epoch = json.loads((run / "run.json").read_text())["config"]["samples_per_epoch"]
    judges = {"reward": JpegIncompressibility(), "tiny-clip": TinyClip(), "tiny-judge": TinyJudge()}
    kept = sorted(p for p in (run / "checkpoints").glob("epoch_*") if int(p.name[6:]) % 5 == 0)
    for checkpoint in [None, *kept]:
        images = int(checkpoint.name[6:]) * per_epoch if checkpoint else 0
        if any(row["images"] == images for row in done):
            continue
        folder = path.parent / f"pictures-{images}"
        loras = [checkpoint] if checkpoint else []
        sample(prompts, model="tiny", loras=loras, seeds=SEEDS, steps=10, guidance=1.0, out=folder, force=True)
        row: dict[str, float] = {"images": images}
        pictures = []
        for file in sorted(folder.glob("*-seed*.png")):
            with Image.open(file) as picture:
                pictures.append((picture.convert("RGB"), picture.text["prompt"]))  # type: ignore[attr-defined]
        texts = [text for _, text in pictures]
        pixels = np.stack([np.asarray(picture) for picture, _ in pictures])
        for name, judge in judges.items():
            given = [picture for picture, _ in pictures] if name == "reward" else pixels
            row[name] = round(float(np.mean(judge.score(given, texts, [{}] * len(texts)))), 4)  # type: ignore[arg-type]
        done.append(row)
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    return sorted(done, key=lambda row: row["images"])


def figure(rows: list[dict[str, float]], path: Path) -> None:
    """The reward on the left axis, the judges on the right one."""
    from matplotlib.figure import Figure

    made = Figure(figsize=(7.5, 4.2), layout="constrained")
    left = made.subplots()
    right = left.twinx()
    images = [row["images"] for row in rows]
    left.plot(images, [row["reward"] for row in rows], color="#c2410c", marker="o", markersize=4, linewidth=2)
    for name, style in (("tiny-clip", "--"), ("tiny-judge", "-")):
        right.plot(images, [row[name] for row in rows], style, color="#1d4ed8", marker="s", markersize=3, label=name)
    left.set_xlabel("images")
    left.set_ylabel("reward: kB of the JPEG file", color="#c2410c")
    right.set_ylabel("agreement with the prompt (cosine)", color="#1d4ed8")
    right.set_ylim(0, 1)
    right.legend(frameon=False, loc="center right")
    left.set_title("jpeg-incompressibility, hacked: the reward rises, the judges fall", fontsize=11)
    left.grid(alpha=0.25, linewidth=0.6)
    made.savefig(path, dpi=110)


if __name__ == "__main__":
    figure(judged(Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[3]))
