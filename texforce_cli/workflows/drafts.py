"""What an epoch has drawn before it is finished: a file for each batch, so that an interruption costs minutes and not an epoch.

<run>/drawn/epoch_NNNN/images_IIIIII.safetensors     the batch whose first image is number I of the epoch
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from texforce_cli.diffusion.sampler import Trajectory
from texforce_cli.files import NotWritten, write_bytes


class Drafts:
    """The batches of the epoch under way. They are written when `seconds` have passed since they last were (0: never), and by
    `save`.

    `made_by` is whose they are, and what their last bits depend on beside the weights: batches that something else has drawn are
    not taken.
    """

    def __init__(
        self, folder: Path, seconds: float, made_by: Mapping[str, str], warn: Callable[[str], None] = lambda text: None
    ) -> None:
        self.folder, self.seconds, self.made_by, self.warn = folder, seconds, dict(made_by), warn
        self._pending: list[tuple[Path, Trajectory]] = []
        self._saved = time.monotonic()
        self._lasts = False
        """Whether something of this epoch was written."""

    def take(
        self, epoch: int, first: int, seeds: Sequence[int], prompts: Sequence[str], device: torch.device
    ) -> Trajectory | None:
        """The batch that begins with image `first`, if it is there whole and its images are the first of those asked for."""
        if not first:
            self._saved, self._lasts = time.monotonic(), False
        try:
            with safetensors.safe_open(self._path(epoch, first), "pt") as file:
                about, names = json.loads(file.metadata()["texforce"]), file.keys()
                # copies: what is mapped cannot be removed everywhere
                found = {name: file.get_tensor(name).to(device, copy=True) for name in names}
            count = len(about["seeds"])
            drawn = Trajectory(
                tuple(prompts[:count]),
                tuple(seeds[:count]),
                found["latents"],
                found["log_probs"],
                found.get("unconditional"),
                found["images"].cpu().numpy(),
            )
        except (OSError, ValueError, KeyError, TypeError, safetensors.SafetensorError):  # not there, or damaged
            return None
        return drawn if about == self._about(drawn) and count else None

    def keep(self, epoch: int, first: int, drawn: Trajectory) -> None:
        """A batch that was drawn, for an interruption to come."""
        if self.seconds:
            self._pending.append((self._path(epoch, first), drawn))
            if time.monotonic() - self._saved >= self.seconds:
                self.save()

    def all_drawn(self) -> None:
        """The epoch is drawn: of one that takes long the rest is written, of another what is in memory is let go."""
        if self._lasts:
            self.save()
        self._pending.clear()

    def save(self) -> int:
        """Write what was drawn since the last time; returns how many images of the epoch are on the disk.

        A disk that is full ends no run: it is told once, and no more is kept.
        """
        with contextlib.suppress(NotWritten):
            while self._pending:
                path, drawn = self._pending[0]
                self._write(path, drawn)
                self._lasts = True
                del self._pending[0]
        if self._pending:
            self.warn(
                f"what the epoch has drawn cannot be kept in '{self.folder}': an interruption costs the whole epoch"
            )
            self.seconds = 0.0
            self.clear()
        self._saved = time.monotonic()
        return sum(_images(path) for path in self.folder.glob("epoch_*/images_*.safetensors"))

    def clear(self, *, but: int | None = None) -> None:
        """Forget every epoch, or every other one than `but`."""
        self._pending.clear()
        for path in self.folder.glob("epoch_*"):
            if but is None or path != self._folder(but):
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.rmdir()

    def _write(self, path: Path, drawn: Trajectory) -> None:
        tensors = {"latents": drawn.latents, "log_probs": drawn.log_probs, "images": torch.from_numpy(drawn.images)}
        if drawn.unconditional is not None:
            tensors["unconditional"] = drawn.unconditional
        ours = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_bytes(path, safetensors.torch.save(ours, {"texforce": json.dumps(self._about(drawn))}))

    def _about(self, drawn: Trajectory) -> dict[str, Any]:
        return {"made_by": self.made_by, "seeds": list(drawn.seeds), "prompts": list(drawn.prompts)}

    def _folder(self, epoch: int) -> Path:
        return self.folder / f"epoch_{epoch + 1:04d}"

    def _path(self, epoch: int, first: int) -> Path:
        return self._folder(epoch) / f"images_{first:06d}.safetensors"


def _images(path: Path) -> int:
    try:
        with safetensors.safe_open(path, "pt") as file:
            return int(file.get_slice("log_probs").get_shape()[1])
    except (OSError, safetensors.SafetensorError):
        return 0
