"""Checkpoints found, checked and loaded strictly, and parts of packages imported alone.

The same file lies in texforce-image-reward and texforce-hpsv2, since a plugin depends on nothing of its neighbours.
"""

from __future__ import annotations

import contextlib
import hashlib
import pickle
import sys
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Published:
    """A file of a Hub repository at a pinned revision, with its SHA-256 where it is a pickle."""

    repository: str
    revision: str
    file: str
    sha256: str = ""

    def __str__(self) -> str:
        return f"'{self.file}' of {self.repository}@{self.revision[:12]}"


def locate(published: Published, given: str, option: str) -> Path:
    """The file on disk: `given` itself or the file in that folder; where `given` is "", from the Hub or its cache.

    Raises:
        FileNotFoundError: it is not there; repository, file and `option` are named.
    """
    if not given:
        return _fetched(published, option)
    path = Path(given).expanduser()
    path = path / published.file if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(f"there is no file '{path}': {option} wants {published}, or a folder that holds it")
    return path


def _fetched(published: Published, option: str) -> Path:
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(published.repository, published.file, revision=published.revision))
    except Exception as error:  # the network boundary: whatever it was, the remedy is the same
        raise FileNotFoundError(
            f"{published} is not on this machine and could not be fetched ({type(error).__name__}): download it where "
            f"there is a network and give it with {option}=FILE"
        ) from error


def read_tensors(path: Path, known: str, allow_pickle: bool, option: str) -> Tensors:
    """The tensors of a checkpoint by name, on the CPU, in the type they were saved in; no code of the file is run.

    A file whose SHA-256 is not `known` needs `allow_pickle`, the option named `option`.

    Raises:
        ValueError: it may not be read, is damaged, or holds something else than tensors.
    """
    if not allow_pickle and (digest := _sha256(path)) != known:
        raise ValueError(
            f"'{path.name}' is a pickle and its SHA-256 {digest} is not {known} of the official file: if you trust "
            f"where it comes from, add {option}=true"
        )
    try:
        # mapped, not read: 2 GB less memory while the model is filled
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        raise ValueError(f"'{path}' is damaged or holds more than tensors: get the official file again") from error
    tensors = loaded.get("state_dict", loaded) if isinstance(loaded, Mapping) else loaded
    if not isinstance(tensors, Mapping) or not all(isinstance(value, torch.Tensor) for value in tensors.values()):
        raise ValueError(f"'{path}' is no table of tensors by name: get the official file again")
    return dict(tensors)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def load_strictly(module: torch.nn.Module, tensors: Tensors, path: Path) -> None:
    """Copy `tensors` into `module`; each of its weights must be there, in its shape, and nothing else.

    Raises:
        ValueError: naming the first three that are missing, unexpected or of another shape.
    """
    wanted = module.state_dict()
    faults = {
        "missing": [name for name in wanted if name not in tensors],
        "unexpected": [name for name in tensors if name not in wanted],
        "of another shape": [n for n in wanted if n in tensors and wanted[n].shape != tensors[n].shape],
    }
    said = [f"{what} {_first(names)}" for what, names in faults.items() if names]
    if said:
        raise ValueError(f"'{path}' does not fit {type(module).__name__} ({'; '.join(said)}): get the official file")
    module.load_state_dict(tensors, strict=True)


def _first(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def choose_device(name: str) -> torch.device:
    """`auto` is CUDA (or ROCm) if there is a GPU, else the CPU.

    Raises:
        ValueError: a device that torch does not know or this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"the device '{name}' is not available here: give auto, cpu or cuda") from error
    return device


class WithoutNoise(torch.overrides.TorchFunctionMode):
    """Within it, modules are made without drawing random weights: strict loading overwrites each of them anyway."""

    _DRAWS = frozenset(
        getattr(home, name)
        for home in (torch.Tensor, torch.nn.init)
        for name in ("normal_", "uniform_", "erfinv_", "kaiming_uniform_", "xavier_uniform_", "trunc_normal_")
        if hasattr(home, name)
    )

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Leave the tensor as it is where `func` would fill it with noise."""
        kwargs = kwargs or {}
        if func in self._DRAWS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


@contextlib.contextmanager
def without_init(*packages: str) -> Iterator[None]:
    """Within it, modules inside `packages` can be imported and the packages' own __init__ is not run.

    What that would import (training code, download clients, tkinter) need not be installed. Parents come first;
    afterwards the packages can be imported whole as ever.

    Raises:
        ModuleNotFoundError: a package that is not installed.
    """
    made: list[str] = []
    try:
        for name in packages:
            if name in sys.modules:
                continue
            parent = name.rpartition(".")[0]
            spec = PathFinder.find_spec(name, list(sys.modules[parent].__path__) if parent else None)
            if spec is None or spec.submodule_search_locations is None:
                raise ModuleNotFoundError(
                    f"the package '{name}' is not installed here: install the reward with --isolated", name=name
                )
            package = ModuleType(name)
            package.__path__ = list(spec.submodule_search_locations)
            package.__spec__ = spec
            sys.modules[name] = package
            made.append(name)
        yield
    finally:
        for name in reversed(made):
            del sys.modules[name]
