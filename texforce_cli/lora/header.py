"""The keys of a LoRA file's header that other tools read: `modelspec.*` and `ss_*`."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate

ARCHITECTURES = {
    "SD 1.x": ("stable-diffusion-v1/lora", "sd_v1"),
    "SD 2.x": ("stable-diffusion-v2-512/lora", "sd_v2"),
    "SDXL": ("stable-diffusion-xl-v1-base/lora", "sdxl_base_v1-0"),
}
"""Base model -> `modelspec.architecture` and `ss_base_model_version` of its LoRAs."""
_CARRIED = ("modelspec.architecture", "ss_base_model_version", "ss_sd_model_name")
_OURS = ("texforce", "texforce.fuse", "texforce.extract")
_DEEPEST = 300  # what is nested more deeply cannot always be written again; a lineage is cut long before
_JSON_TEXT = re.compile(r'"(?:[^"\\]|\\.)*"')


def model_keys(
    bases: Collection[str],
    sources: Sequence[Mapping[str, str]],
    *,
    title: str,
    description: str,
    rank: int,
    alpha: float,
) -> dict[str, str]:
    """What a fused file says of its base, rank and origin; what all the sources agree on is carried over."""
    known = ARCHITECTURES.get(next(iter(bases)), ("", "")) if len(bases) == 1 else ("", "")
    made = dict(zip(_CARRIED, known))
    shared = {key: sources[0][key] for key in _CARRIED if sources[0].get(key) and _agree(sources, key)}
    described = {key: value for key, value in {**made, **shared}.items() if value}
    return {
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.title": title[:500],
        "modelspec.description": description,
        "ss_network_module": "networks.lora",
        "ss_network_dim": str(rank),
        "ss_network_alpha": f"{alpha:g}",
        **described,
    }


def shared_training(sources: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The `texforce` key of a fused file: what the runs behind all of its sources have in common, such as the base."""
    runs = []
    for source in sources:
        try:
            run = json.loads(source.get("texforce", "{}"))
        except (ValueError, RecursionError):
            run = {}
        runs.append(run if isinstance(run, dict) else {})
    common = {key: value for key, value in runs[0].items() if all(run.get(key) == value for run in runs[1:])}
    return {"texforce": json.dumps(common, sort_keys=True)} if common.get("base") else {}


def without_abysses(metadata: Mapping[str, str]) -> dict[str, str]:
    """A header without those of our keys whose JSON is nested as deeply as no command of ours writes it."""
    return {key: text for key, text in metadata.items() if key not in _OURS or _depth(text) <= _DEEPEST}


def _depth(text: str) -> int:
    return max(accumulate((c in "[{") - (c in "]}") for c in _JSON_TEXT.sub("", text)), default=0)


def _agree(sources: Sequence[Mapping[str, str]], key: str) -> bool:
    return len({source.get(key) for source in sources}) == 1
