"""The keys of a LoRA file's header that other tools read: `modelspec.*` and `ss_*`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from typing import Any

from texforce_cli.lora.lora import told_base

ARCHITECTURES = {
    "SD 1.x": ("stable-diffusion-v1/lora", "sd_v1"),
    "SD 2.x": ("stable-diffusion-v2-512/lora", "sd_v2"),
    "SDXL": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
}
"""Base model -> `modelspec.architecture` and `ss_base_model_version` of its LoRAs."""
_BASE = ("modelspec.architecture", "ss_base_model_version")
_V2 = {"SD 1.x": "False", "SD 2.x": "True"}  # by which the WebUI tells the two apart
_CARRIED = re.compile(r"(modelspec\.|ss_)\w+")
_NEW = re.compile(
    r"modelspec\.(sai_model_spec|implementation|title|description|date|hash_sha256|thumbnail|merged_from)|ss_(v2|network_\w+|output_name)"
)
"""What sources say of themselves that is not so of what they are fused into."""
_DEEPEST = 300  # as no command of ours writes it, and cannot always be written again; a lineage is cut long before
_JSON_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"?')  # an end that is missing is not looked for from every quote again


def model_keys(
    bases: Collection[str],
    sources: Sequence[Mapping[str, str]],
    *,
    title: str,
    description: str,
    rank: int,
    alpha: float,
    implementation: str,
) -> dict[str, str]:
    """What a fused file says of its base, rank and origin; what all the sources agree on, such as their author, is carried over."""
    base = next(iter(bases)) if len(bases) == 1 else ""
    carried = {key: value for key, value in sources[0].items() if _CARRIED.fullmatch(key) and _agree(sources, key)}
    for key, known in zip(_BASE, ARCHITECTURES.get(base, ("", ""))):
        told = told_base({key: carried.get(key, "")})
        if known and told != base:
            carried[key] = known
        elif bases and told not in (None, *bases):
            del carried[key]
    return {
        **{key: value for key, value in carried.items() if value and not _NEW.fullmatch(key)},
        **({"ss_v2": _V2[base]} if base in _V2 else {}),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.implementation": implementation,
        "modelspec.title": title[:500],
        "modelspec.description": description,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
    }


def shared_training(sources: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The `texforce` key of a fused file: what the runs behind all of its sources have in common, such as the base."""
    runs = [told(source, "texforce") for source in sources]
    common = {key: value for key, value in runs[0].items() if all(run.get(key) == value for run in runs[1:])}
    return {"texforce": json.dumps(common, sort_keys=True)} if common.get("base") else {}


def told(metadata: Mapping[str, str], key: str) -> dict[str, Any]:
    """What a header says by a key whose text is a JSON object; {} where it says nothing, nonsense, or what is nested too deeply."""
    text = metadata.get(key, "")
    try:
        about = json.loads(text) if _depth(text) <= _DEEPEST else {}
    except ValueError:
        return {}
    return about if isinstance(about, dict) else {}


def _depth(text: str) -> int:
    return max(accumulate((c in "[{") - (c in "]}") for c in _JSON_TEXT.sub("", text)), default=0)


def _agree(sources: Sequence[Mapping[str, str]], key: str) -> bool:
    return len({source.get(key) for source in sources}) == 1
