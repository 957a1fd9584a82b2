"""`texforce demo`: the main job at its smallest, through the same code, ending with a picture to open."""

from __future__ import annotations

from pathlib import Path

from texforce_cli.workflows.events import Listener, silent
from texforce_cli.workflows.run_folder import RunFolder
from texforce_cli.workflows.train import TrainResult, train


def demo(*, images: int, seed: int, out: Path | None, listener: Listener = silent) -> tuple[TrainResult, Path]:
    """Train the embedded model on jpeg-incompressibility and draw the held-out pairs before and after.

    Raises:
        TexforceError: as `train`.
    """
    flags = {
        "reward": ["jpeg-incompressibility"],
        "model": "tiny",
        "prompts": "animals",
        "images": images,
        "seed": seed,
        "out": str(out or _free(Path("runs"))),
    }
    result = train(flags, listener=listener)
    return result, RunFolder(result.folder).before_after


def _free(folder: Path) -> Path:
    path, number = folder / "demo", 1
    while path.exists():
        number += 1
        path = folder / f"demo-{number}"
    return path
