"""Pickled LoRAs, read only where they were asked for, and then their tensors alone (torch's `weights_only`)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from texforce_cli.errors import TexforceError
from texforce_cli.tensorfile import Array, Entry


@dataclass(frozen=True)
class PickledTensors:
    """The tensors of a pickle, in memory; `entries` tell their shapes, a pickle has no places."""

    path: Path
    values: Mapping[str, Array]
    entries: Mapping[str, Entry]

    def finite(self, key: str) -> Array:
        """As TensorFile.finite."""
        if not np.isfinite(self.values[key]).all():
            raise TexforceError(f"'{self.path}' holds NaN or infinite values in '{key}'", "it cannot be used")
        return self.values[key]


def read_pickle(path: Path) -> PickledTensors:
    """The tensors of a .bin, .pt or .ckpt file; nothing else in it is made.

    Raises:
        TexforceError: it holds more than tensors, or is damaged.
    """
    import torch  # the one place of this package that needs it

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a hostile pickle raises whatever it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0][:150]
        raise TexforceError(f"'{path}' cannot be read as tensors alone ({reason})", "do not trust this file") from error
    loaded = loaded.get("state_dict", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(loaded, dict) or not loaded:
        raise TexforceError(f"'{path}' holds no table of tensors", "it is not a LoRA")
    values = {}
    for key, value in loaded.items():
        if not isinstance(key, str) or not isinstance(value, torch.Tensor):
            raise TexforceError(f"'{path}' holds {type(value).__name__} '{str(key)[:60]}'", "it is not a LoRA")
        values[key] = value.detach().to(torch.float64 if value.dtype == torch.float64 else torch.float32).numpy()
    return PickledTensors(path, values, {key: Entry("F32", value.shape, 0, 0) for key, value in values.items()})
