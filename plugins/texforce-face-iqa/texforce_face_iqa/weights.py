"""Checkpoints: on disk or fetched, read without running code, loaded strictly."""

from __future__ import annotations

import hashlib
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Published:
    """An official file: where it lies, its SHA-256 or the first digits of it, and the option that gives another."""

    repository: str
    file: str
    sha256: str
    option: str

    def __str__(self) -> str:
        return f"'{self.file}' of {self.repository}"

    @property
    def by_hand(self) -> str:
        """What to do where it cannot be fetched."""
        return f"get it by hand and give it with --reward-option face-iqa.{self.option}=FILE"


def locate(published: Published, given: str, fetch: Callable[[], str]) -> Path:
    """The file `given`, or, without one, what `fetch` brings.

    Raises:
        FileNotFoundError: there is no such file, or it could not be fetched; repository, file and option are named.
    """
    if given:
        path = Path(given).expanduser()
        if not path.is_file():
            raise FileNotFoundError(f"there is no file '{path}' (option {published.option}); it wants {published}")
        return path
    try:
        return Path(fetch())
    except Exception as error:  # the network boundary: whatever it was, the remedy is the same
        raise FileNotFoundError(
            f"{published} could not be fetched ({type(error).__name__}); {published.by_hand}"
        ) from error


def read(path: Path, published: Published, *, allow_pickle: bool) -> Tensors:
    """The tensors of the checkpoint by name, on the CPU.

    Raises:
        ValueError: a pickle that is not the official file, without `allow_pickle`; or a file that is damaged or holds
            other things than tensors.
    """
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return dict(load_file(path))
        except SafetensorError as error:
            raise ValueError(f"'{path}' (option {published.option}) is damaged ({error}); get it again") from error
    digest = _sha256(path)
    if not (digest.startswith(published.sha256) or allow_pickle):
        raise ValueError(
            f"'{path.name}' (option {published.option}) is a pickle and its SHA-256 {digest} does not begin with "
            f"{published.sha256} as that of {published} does; "
            "if you trust where it comes from, add --reward-option face-iqa.allow_pickle=true"
        )
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(
            f"'{path.name}' (option {published.option}) is damaged or holds more than tensors; get {published} again"
        ) from error
    tensors = loaded.get("params", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(tensors, Mapping) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"'{path.name}' (option {published.option}) is no table of tensors; it wants {published}")
    # checkpoints that were saved by several processes carry the prefix
    return {str(name).removeprefix("module."): value for name, value in tensors.items()}


def load_strictly(module: torch.nn.Module, tensors: Tensors, path: Path, published: Published) -> None:
    """Copy `tensors` into `module`; each of its weights must be there, in its shape, and nothing else.

    Raises:
        ValueError: naming the first three of what is missing, unexpected or of another shape.
    """
    wanted = module.state_dict()
    faults = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "of another shape": [n for n in wanted if n in tensors and wanted[n].shape != tensors[n].shape],
    }
    said = [f"{what} {_first(names)}" for what, names in faults.items() if names]
    if said:
        raise ValueError(
            f"'{path.name}' (option {published.option}) does not fit {type(module).__name__}: {'; '.join(said)}; "
            f"it wants {published}"
        )
    module.load_state_dict(tensors, strict=True)


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
