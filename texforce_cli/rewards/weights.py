"""The weights of rewards: found on disk or on the Hub at a pinned revision, read without running code, loaded strictly.

Official files are often pickles. They are read with `weights_only`, and only if their SHA-256 is known or the user allows
it; each is converted once to safetensors, in the cache.
"""

from __future__ import annotations

import contextlib
import pickle
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from texforce_cli.errors import TexforceError
from texforce_cli.files import atomic_path, sha256, user_folder, user_path

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Published:
    """A file of a Hub repository at a pinned revision, with its SHA-256 where that is publicly stated."""

    repository: str
    revision: str
    file: str
    sha256: str = ""

    def __str__(self) -> str:
        return f"'{self.file}' of {self.repository}@{self.revision[:12]}"

    def sibling(self, file: str) -> Published:
        """Another file of the same repository and revision."""
        return Published(self.repository, self.revision, file)


def locate(published: Published, given: str, option: str) -> Path:
    """The file on disk: from the Hub (or its cache) if `given` is "", else `given` itself or the file in that folder.

    Raises:
        TexforceError: it is not there; repository, file and `option` (as in "hpsv2.weights") are named.
    """
    if not given:
        return _fetched(published, option)
    path = user_path(given)
    if path.is_dir():
        path = path / published.file
    if not path.is_file():
        raise TexforceError(
            f"there is no file '{path}'",
            f"--reward-option {option}=PATH wants {published}, or a folder that holds it; left out, it comes from the Hub",
        )
    return path


def _fetched(published: Published, option: str) -> Path:
    from huggingface_hub import constants, hf_hub_download

    command = f"`hf download {published.repository} {published.file} --revision {published.revision}`"
    by_hand = f"or give it with --reward-option {option}=PATH"
    try:
        return Path(hf_hub_download(published.repository, published.file, revision=published.revision))
    except Exception as error:  # the network boundary: whatever it was, the remedy is the same
        if constants.is_offline_mode():
            raise TexforceError(
                f"{published} is not on this machine and HF_HUB_OFFLINE is set", f"run {command} without it, {by_hand}"
            ) from error
        raise TexforceError(
            f"{published} could not be fetched ({type(error).__name__})", f"run {command} to see why, {by_hand}"
        ) from error


def read_tensors(path: Path, reward: str, *, known: str = "", allow_pickle: bool = False) -> Tensors:
    """The tensors of a checkpoint by name, on the CPU, of the type they were saved in.

    A pickle whose SHA-256 is not `known` needs `allow_pickle`, an option of `reward`.

    Raises:
        TexforceError: a pickle that may not be read, or a file that is damaged or holds something else than tensors.
    """
    if path.suffix == ".safetensors":
        return _from_safetensors(path)
    digest = sha256(path)
    if digest != known and not allow_pickle:
        found = f"its SHA-256 {digest} is not {known}" if known else "no SHA-256 of the official file is known"
        raise TexforceError(
            f"'{path.name}' is a pickle and {found}",
            f"if you trust where it comes from, add --reward-option {reward}.allow_pickle=true",
        )
    cached = user_folder("cache") / "weights" / f"{digest}.safetensors"
    if cached.is_file():
        return _from_safetensors(cached)
    tensors = _from_pickle(path)
    # without a cache it only costs time; a full disk is one of safetensors' own errors
    with contextlib.suppress(TexforceError, SafetensorError), atomic_path(cached) as temporary:
        save_file(tensors, temporary)
    return tensors


def _from_safetensors(path: Path) -> Tensors:
    try:
        tensors: Tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise TexforceError(f"'{path}' is damaged ({error})", "delete it and get it again") from error
    return tensors


def _from_pickle(path: Path) -> Tensors:
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise TexforceError(
            f"'{path.name}' is damaged or holds more than tensors", "get the official file again"
        ) from error
    tensors = loaded["state_dict"] if isinstance(loaded, dict) and "state_dict" in loaded else loaded
    if not isinstance(tensors, Mapping) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise TexforceError(f"'{path.name}' is no table of tensors by name", "get the official file again")
    return {str(name): value.clone().contiguous() for name, value in tensors.items()}  # safetensors shares no memory


def shape(tensors: Mapping[str, Any], name: str, path: Path) -> tuple[int, ...]:
    """The shape of the tensor `name`, from which an architecture is read.

    Raises:
        TexforceError: the checkpoint `path` does not hold it.
    """
    if name not in tensors:
        raise TexforceError(
            f"'{path.name}' holds no '{name}', so it is another kind of checkpoint", "get the official file"
        )
    return tuple(tensors[name].shape)


def layers(tensors: Iterable[str], prefix: str) -> int:
    """How many numbered layers there are under `prefix`, as in "visual.transformer.resblocks."."""
    return len({name.removeprefix(prefix).split(".")[0] for name in tensors if name.startswith(prefix)})


def load_strictly(module: torch.nn.Module, tensors: Tensors, path: Path) -> None:
    """Copy `tensors` into `module`; each of its weights must be there, in its shape, and nothing else.

    Raises:
        TexforceError: naming the first three of what is missing, unexpected or of another shape.
    """
    wanted = module.state_dict()
    faults = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "of another shape": [n for n in wanted if n in tensors and wanted[n].shape != tensors[n].shape],
    }
    said = [f"{what} {_first(names)}" for what, names in faults.items() if names]
    if said:
        raise TexforceError(
            f"'{path.name}' does not fit {type(module).__name__}: {'; '.join(said)}", "get the official file"
        )
    module.load_state_dict(tensors, strict=True)


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
