"""Pickled LoRAs, read only where they were asked for, and then their tensors alone (torch's `weights_only`)."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.tensorfile import Array, Entry, finite, refuse_impostors, shown


@dataclass(frozen=True)
class PickledTensors:
    """The tensors of a pickle, in memory; `entries` tell their shapes, a pickle has no places."""

    path: Path
    values: Mapping[str, Array]
    entries: Mapping[str, Entry]

    def finite(self, key: str) -> Array:
        """As TensorFile.finite."""
        return finite(self.path, key, self.values[key])


def read_pickle(path: Path) -> PickledTensors:
    """The tensors of a .bin, .pt or .ckpt file; nothing else in it is made.

    Raises:
        UsageError: there is no such file.
        TexforceError: it holds more than tensors, or is damaged.
    """
    if not path.is_file():
        raise UsageError(f"there is no file '{path}'", "check the path")
    try:
        with path.open("rb") as handle:
            start = handle.read(64)
    except OSError as error:
        raise TexforceError(f"'{path}' could not be read ({error.strerror or error})", "check the file") from error
    refuse_impostors(path, start, pickles=True)
    import torch  # the one place of this package that needs it

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what cannot be read is told below, in a sentence
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle raises whatever it likes
        told = (
            str(error).rpartition("WeightsUnpickler error: ")[2].strip()
        )  # without the advice to read it all the same
        reason = (told or type(error).__name__).splitlines()[0][:150]
        raise TexforceError(f"'{path}' cannot be read as tensors alone ({reason})", "do not trust this file") from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not loaded:
        raise TexforceError(f"'{path}' holds no table of tensors", "it is not a LoRA")
    kinds = {torch.float64: "F64", torch.float16: "F16", torch.bfloat16: "BF16"}
    values, entries = {}, {}
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise TexforceError(f"'{path}' holds {type(value).__name__} '{shown(str(key))}'", "it is not a LoRA")
        dtype = torch.float64 if value.dtype == torch.float64 else torch.float32
        try:
            values[key] = value.detach().to(dtype).numpy()
        except Exception as error:  # sparse, quantised, without storage: each has its own
            raise TexforceError(f"'{path}' holds '{shown(key)}' as no plain tensor", "it is not a LoRA") from error
        entries[key] = Entry(kinds.get(value.dtype, "F32"), tuple(value.shape), 0, 0)
    return PickledTensors(path, values, entries)
