"""Both judges on the pictures of `texforce sample --prompts SET --lora RUN --compare --out FOLDER`.

    python docs/experiments/alignment.py SET FOLDER...

One JSON line a folder: the change of each judge's score from base to tuned on seen and unseen prompts, with the paired
95 % interval over prompts (the seeds of a prompt are averaged first: they are not independent).
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

from texforce_cli.core.statistics import paired_interval
from texforce_cli.prompts import load_prompts
from texforce_cli.rewards.builtin.emoji import TinyClip, TinyJudge


def change(folder: Path, prompt_set: str) -> dict[str, object]:
    """Judge -> split -> base mean, tuned mean, difference and half width of its interval."""
    splits = load_prompts(prompt_set, "tiny")
    result: dict[str, object] = {"folder": folder.name}
    for judge in (TinyClip(), TinyJudge()):
        scores: dict[tuple[str, str], list[float]] = defaultdict(list)
        for path in sorted(folder.glob("*-seed*.png")):
            with Image.open(path) as picture:
                prompt = picture.text["prompt"]  # type: ignore[attr-defined]
                variant = path.stem.rpartition("-")[2]
                scores[prompt, variant] += judge.score(np.asarray(picture.convert("RGB"))[None], [prompt], [{}])
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
            }
        result[type(judge).__name__] = rows
    return result


if __name__ == "__main__":
    for name in sys.argv[2:]:
        print(json.dumps(change(Path(name), sys.argv[1])), flush=True)
