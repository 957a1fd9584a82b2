"""What an epoch has drawn before it is finished: a file for each batch, so that an interruption costs minutes and not an epoch.

<run>/drawn/epoch_NNNN/images_IIIIII.safetensors     the batch whose first image is number I of the epoch
"""

from __future__ import annotations

import contextlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import safetensors
import safetensors.torch
import torch

from texforce_cli.algorithms.ddpo import Kept
from texforce_cli.diffusion.sampler import Trajectory
from texforce_cli.files import NotWritten, write_bytes
from texforce_cli.workflows.run_folder import RunFolder, versions

_STATES = {"latents", "log_probs", "unconditional"}
"""What has a place for each image in its second dimension."""

_DAMAGED = (OSError, ValueError, LookupError, TypeError, safetensors.SafetensorError)
"""What reading a file raises that is torn or none of ours."""

_DRAWN_WITH = ("texforce", "diffusers", "transformers", "peft")
"""Beside torch, the packages by which a picture is drawn."""


class Drafts(Kept):
    """The batches of the epoch under way that this process draws. They are written when `seconds` have passed since they last were
    (0: never), and by `save`; only where the run works, which a process on another machine may not see.

    An image that another run has drawn, or something else on which its last bits depend beside the weights, is not found.
    """

    def __init__(self, folder: RunFolder, seconds: float, device: str, *, compiled: bool = False) -> None:
        self.folder, self.seconds = folder, seconds
        here = versions()
        self.made_by = {
            "run": folder.id,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
            "compiled": compiled,
            **{name: here.get(name) for name in _DRAWN_WITH},
        }
        self._pending: list[tuple[Path, Trajectory]] = []
        self._saved = time.monotonic()
        self._written: list[Path] = []
        """By this process, of this epoch."""
        self._said: list[str] = []

    def found(self, epoch: int, prompts: Mapping[int, str], device: torch.device) -> Iterator[Trajectory]:
        """Those of the images that are there, whichever process has drawn them: a file at a time."""
        self._saved, self._written = time.monotonic(), []
        wanted = dict(prompts)
        for path in sorted(self._folder(epoch).glob("images_*.safetensors")):
            drawn = self._read(path, wanted, device)
            if drawn is not None:
                for seed in drawn.seeds:
                    del wanted[seed]
                yield drawn

    def keep(self, epoch: int, first: int, drawn: Trajectory) -> None:
        """A batch that was drawn, for an interruption to come."""
        if self.seconds:
            self._pending.append((self._folder(epoch) / f"images_{first:06d}.safetensors", drawn))
            if time.monotonic() - self._saved >= self.seconds:
                self.save()

    def all_drawn(self) -> None:
        """This process has drawn its share: of an epoch that takes long the rest is written, of another it is let go."""
        if self._written:
            self.save()
        self._pending.clear()

    def save(self) -> None:
        """Write what was drawn since the last time.

        A disk that is full ends no run: it is told once, and this process keeps no more.
        """
        self._saved = time.monotonic()
        if not self._pending or self.folder.run_id() != self.folder.id:
            return
        with contextlib.suppress(NotWritten):
            while self._pending:
                path, drawn = self._pending[0]
                self._write(path, drawn)
                self._written.append(path)
                del self._pending[0]
        if self._pending:
            self._said.append(
                f"what the epoch has drawn cannot be kept in '{self.folder.drawn}': an interruption may cost the whole epoch"
            )
            self.seconds = 0.0
            self._pending.clear()
            for path in self._written:
                with contextlib.suppress(OSError):
                    path.unlink()

    def warnings(self) -> list[str]:
        """What there is to say since the last call."""
        said, self._said = self._said, []
        return said

    def count(self) -> int:
        """How many images are on the disk that a resumed run would take, of all processes."""
        return sum(self._images(path) for path in self.folder.drawn.glob("epoch_*/images_*.safetensors"))

    def clear(self, *, but: int | None = None) -> None:
        """Forget every epoch, or every other one than `but`, whichever process has drawn it."""
        self._pending.clear()
        for path in self.folder.drawn.glob("epoch_*"):
            if but is None or path != self._folder(but):
                shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.drawn.rmdir()

    def _images(self, path: Path) -> int:
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["texforce"])
                return len(about["seeds"]) if about["made_by"] == self.made_by else 0
        except _DAMAGED:
            return 0

    def _read(self, path: Path, wanted: Mapping[int, str], device: torch.device) -> Trajectory | None:
        """Those of the images `wanted` that a file has; None where there are none, or it is damaged."""
        try:
            with safetensors.safe_open(path, "pt") as file:
                about = json.loads(file.metadata()["texforce"])
                images = list(zip(about["seeds"], about["prompts"], strict=True))
                places = [i for i, (seed, prompt) in enumerate(images) if wanted.get(seed) == prompt]
                if about["made_by"] != self.made_by or not places:
                    return None
                # copies: what is mapped cannot be removed everywhere
                found = {name: file.get_tensor(name)[:, places].to(device) for name in _STATES & {*file.keys()}}
                return Trajectory(
                    tuple(images[i][1] for i in places),
                    tuple(images[i][0] for i in places),
                    found["latents"],
                    found["log_probs"],
                    found.get("unconditional"),
                    file.get_tensor("images")[places].numpy(),
                )
        except _DAMAGED:
            return None

    def _write(self, path: Path, drawn: Trajectory) -> None:
        tensors = {"latents": drawn.latents, "log_probs": drawn.log_probs, "images": torch.from_numpy(drawn.images)}
        if drawn.unconditional is not None:
            tensors["unconditional"] = drawn.unconditional
        ours = {name: tensor.contiguous() for name, tensor in tensors.items()}
        about = {"made_by": self.made_by, "seeds": drawn.seeds, "prompts": drawn.prompts}
        write_bytes(path, safetensors.torch.save(ours, {"texforce": json.dumps(about)}))

    def _folder(self, epoch: int) -> Path:
        return self.folder.drawn / f"epoch_{epoch + 1:04d}"
