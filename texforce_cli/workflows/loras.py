"""LoRAs as the commands that draw and train use them: named with a weight, read whole, the weight in the factors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from texforce_cli.diffusion.models import replace_weights
from texforce_cli.errors import TexforceError
from texforce_cli.lora.full import open_full
from texforce_cli.lora.lora import Lora
from texforce_cli.lora.read import read_lora
from texforce_cli.lora.spec import LoraSpec, parse_lora
from texforce_cli.tensorfile import Array


@dataclass(frozen=True)
class LoadedLora:
    """A LoRA in memory: `arrays` by their keys in diffusers' form, alpha = rank, scale and weight folded into B."""

    spec: LoraSpec
    lora: Lora
    arrays: Mapping[str, Array]

    @property
    def trained(self) -> dict[str, Any]:
        """What texforce wrote into it about its training; {} for other LoRAs and for nonsense."""
        try:
            about = json.loads(self.lora.metadata.get("texforce", "{}"))
        except (ValueError, RecursionError):
            return {}
        return about if isinstance(about, dict) else {}

    @property
    def about(self) -> dict[str, Any]:
        """What a picture's record says of it: file names, hashes, weights; no path of this machine."""
        names = [file.name for file in self.lora.files]
        return {"file": names[0], "weight": dict(self.spec.parts) or self.spec.weight, "sha256": self.lora.sha256()[0]}


def load_lora(text: str, *, allow_pickle: bool = False) -> LoadedLora:
    """Read `SOURCE[:WEIGHT]`.

    Raises:
        UsageError, TexforceError: as `parse_lora` and `read_lora`; NaN or infinite values.
    """
    spec = parse_lora(text)
    lora = read_lora(spec.source, allow_pickle=allow_pickle)
    return LoadedLora(spec, lora, lora.arrays(spec.weight_of))


def put_weights(pipeline: Any, component: str, source: str, *, allow_pickle: bool = False) -> None:
    """Give the U-Net or text encoder of a pipeline the weights of a folder or file.

    Raises:
        UsageError, TexforceError: as `open_full`; weights of another kind of model, or not whole.
    """
    weights = open_full(source, allow_pickle=allow_pickle)
    own = [name for name in weights.places if name.startswith(f"{component}.")]
    if not own:
        raise TexforceError(f"'{source}' holds no {component}, but {', '.join(weights.components)}", "check the file")
    replace_weights(pipeline, component, source, own, weights.read)
