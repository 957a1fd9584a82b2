"""`texforce demo`: the main job at its smallest, through the same code, ending with a picture to open."""

from __future__ import annotations

from pathlib import Path

from texforce_cli.workflows.events import Listener, silent
from texforce_cli.workflows.run_folder import RunFolder
from texforce_cli.workflows.train import train
from texforce_cli.workflows.training_run import TrainResult


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
        "out": str(out) if out else None,
    }
    result = train(flags, listener=listener, stem="demo")
    return result, RunFolder(result.folder).before_after
