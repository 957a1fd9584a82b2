"""What a LoRA file is: format, base model, components, ranks, alphas, size of the change, who made it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any

from texforce_cli.core.lora_algebra import squared_norm
from texforce_cli.files import finite
from texforce_cli.lora.header import told
from texforce_cli.lora.lora import Lora, LoraModule
from texforce_cli.lora.read import read_lora

_TOLD = {
    "title": "modelspec.title",
    "author": "modelspec.author",
    "description": "modelspec.description",
    "licence": "modelspec.license",
    "base model": "ss_sd_model_name",
    "trigger": "modelspec.trigger_phrase",
}


def inspect_lora(source: str, *, allow_pickle: bool = False) -> dict[str, Any]:
    """What a file is, as plain values.

    Raises:
        UsageError, TexforceError: as `read_lora`.
    """
    lora = read_lora(source, allow_pickle=allow_pickle)
    return {
        "source": source,
        "files": [str(file) for file in lora.files],
        "bytes": sum(file.stat().st_size for file in lora.files),
        "sha256": lora.sha256(),
        "format": lora.format,
        "base": lora.base,
        "warnings": list(lora.warnings),
        "components": {component: _component(lora.of(component)) for component in lora.components},
        "made_by": _made_by(lora),
    }


def _component(modules: Sequence[LoraModule]) -> dict[str, Any]:
    norm = math.sqrt(sum(module.scale**2 * squared_norm((module.a(), module.b())) for module in modules))
    return {
        "modules": len(modules),
        "convolutions": sum(bool(set(module.kernel) - {1}) for module in modules),
        "ranks": _counted(module.rank for module in modules),
        "alphas": _counted(round(module.alpha, 6) for module in modules),
        "dtypes": _counted(module.tensors.entries[module.a_key].dtype for module in modules),
        "norm": norm,
    }


def _counted(values: Any) -> dict[str, int]:
    return {f"{value:g}" if isinstance(value, float) else str(value): n for value, n in Counter(values).most_common()}


def _made_by(lora: Lora) -> dict[str, Any]:
    about: dict[str, Any] = {name: lora.metadata[key][:500] for name, key in _TOLD.items() if lora.metadata.get(key)}
    for key in ("texforce", "texforce.fuse", "texforce.extract"):
        if value := told(lora.metadata, key):
            about[key] = finite(value)
    return about
