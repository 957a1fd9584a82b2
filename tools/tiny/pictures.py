"""Pictures of the world with their scenes and captions, drawn in parallel and kept on the disk."""

from __future__ import annotations

import json
import random
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from texforce_cli.core.seeds import derive
from texforce_cli.files import atomic_path
from tools.tiny.world import CORRUPTED, Item, Scene, caption, corrupt, draw_scene, render

_CHUNK = 1000


@dataclass(frozen=True)
class Pictures:
    """`images` uint8 (n, 64, 64, 3); what they show; and a caption of each, some of them corrupted."""

    images: np.ndarray
    scenes: list[Scene]
    captions: list[str]


def pictures(folder: Path, name: str, count: int, seed: int, **options: Any) -> Pictures:
    """The `count` pictures called `name`: from `folder`, else drawn; `options` are those of `draw_scene`."""
    images, texts = folder / f"{name}.npy", folder / f"{name}.jsonl"
    if not texts.exists():
        starts = range(0, count, _CHUNK)
        jobs = [(name, seed, start, min(count, start + _CHUNK), options) for start in starts]
        with ProcessPoolExecutor() as pool:
            parts = list(pool.map(_chunk, jobs))
        with atomic_path(images) as temporary, temporary.open("wb") as file:
            np.save(file, np.concatenate([part[0] for part in parts]))
        with atomic_path(texts) as temporary:
            temporary.write_text("".join(line + "\n" for part in parts for line in part[1]), encoding="utf-8")
    rows = [json.loads(line) for line in texts.read_text(encoding="utf-8").splitlines()]
    if len(rows) != count:
        raise SystemExit(f"{texts} holds {len(rows)} pictures, not {count}: give another folder, or delete this one")
    scenes = [Scene(tuple(Item(**item) for item in row["items"]), row["place"]) for row in rows]
    return Pictures(np.load(images, mmap_mode="r"), scenes, [row["caption"] for row in rows])


def _chunk(job: tuple[str, int, int, int, dict[str, Any]]) -> tuple[np.ndarray, list[str]]:
    name, seed, start, stop, options = job
    images, lines = [], []
    for index in range(start, stop):
        rng = random.Random(derive(seed, name, index))
        scene = draw_scene(rng, **options)
        images.append(render(scene, rng))
        said = corrupt(scene, rng) if rng.random() < CORRUPTED else scene
        lines.append(json.dumps({**asdict(scene), "caption": caption(said, rng)}))
    return np.stack(images), lines
