"""Checkpoints: written whole or not at all, checked when read, the oldest removed."""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from texforce_cli.errors import TexforceError, first_line
from texforce_cli.files import patiently, settle, sha256, write_bytes, write_error, write_json
from texforce_cli.lora.read import FILE_NAME

_STATE, _TENSORS = "state.json", "state.safetensors"


@dataclass(frozen=True)
class Checkpoint:
    """The state at the end of an epoch: exact parameters and moments, and plain JSON values."""

    epoch: int
    tensors: Mapping[str, Tensor]
    numbers: Mapping[str, Any]


def save(folder: Path, checkpoint: Checkpoint, lora: bytes) -> None:
    """Write `folder/epoch_NNNN` with a LoRA file that other commands load beside the state.

    Raises:
        TexforceError: the disk is full or read-only; the earlier checkpoints are untouched.
    """
    final = place(folder, checkpoint.epoch)
    temporary = folder / f".{final.name}.{uuid.uuid4().hex[:8]}.tmp"
    try:
        temporary.mkdir(parents=True)
        write_bytes(temporary / FILE_NAME, lora)
        write_bytes(temporary / _TENSORS, safetensors.torch.save(dict(checkpoint.tensors)))
        hashes = {name: sha256(temporary / name) for name in (FILE_NAME, _TENSORS)}
        write_json(temporary / _STATE, {"epoch": checkpoint.epoch, "sha256": hashes, "numbers": checkpoint.numbers})
        if final.exists():
            shutil.rmtree(final)
        patiently(lambda: temporary.replace(final))
        settle(folder)
    except OSError as error:
        raise write_error(final, error) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def load_latest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a sentence for each damaged one that was passed over.

    Raises:
        TexforceError: one cannot be read, which is no damage.
    """
    damaged: list[str] = []
    for epoch in sorted(epochs(folder), reverse=True):
        path = place(folder, epoch)
        try:
            state = json.loads((path / _STATE).read_text(encoding="utf-8"))
            if any(sha256(path / name) != expected for name, expected in state["sha256"].items()):
                raise ValueError("a file does not match its SHA-256")
            # not load_file, which maps the file for as long as its tensors live: Windows removes no such file
            tensors = safetensors.torch.load((path / _TENSORS).read_bytes())
            return Checkpoint(state["epoch"], tensors, state["numbers"]), damaged
        except (FileNotFoundError, ValueError, KeyError, TypeError, safetensors.SafetensorError) as error:
            damaged.append(f"the checkpoint '{path}' is damaged ({first_line(error)}); using the one before")
        except OSError as error:
            raise TexforceError(
                f"the checkpoint '{path}' cannot be read ({error.strerror})",
                "resume when that is mended, or move it away to go on from the one before",
            ) from error
    return None, damaged


def epochs(folder: Path) -> list[int]:
    """The epochs that have a checkpoint."""
    names = [path.name for path in folder.glob("epoch_*") if path.is_dir()]
    return sorted(int(name[6:]) for name in names if name[6:].isdigit())


def prune(folder: Path, *, keep: int, every: int, best: int | None) -> None:
    """Remove all but the last `keep`, the `best`, and every `every`-th."""
    found = epochs(folder)
    for epoch in found[:-keep]:
        if epoch != best and not (every and epoch % every == 0):
            shutil.rmtree(place(folder, epoch), ignore_errors=True)


def remove_after(folder: Path, epoch: int) -> None:
    """Remove the checkpoints of later epochs, which a resumed run makes anew."""
    for later in epochs(folder):
        if later > epoch:
            shutil.rmtree(place(folder, later), ignore_errors=True)


def place(folder: Path, epoch: int) -> Path:
    """Where the checkpoint of this epoch is."""
    return folder / f"epoch_{epoch:04d}"
