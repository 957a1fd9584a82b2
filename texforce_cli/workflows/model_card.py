"""The adapter that a run leaves behind: a LoRA file that others load, with its header and a model card."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from texforce_cli import __version__
from texforce_cli.diffusion.models import fingerprint
from texforce_cli.files import write_bytes, write_text
from texforce_cli.lora.header import ARCHITECTURES
from texforce_cli.lora.lora import GENERATIONS
from texforce_cli.lora.read import FILE_NAME
from texforce_cli.lora.write import lora_bytes
from texforce_cli.workflows.events import Evaluation

if TYPE_CHECKING:
    from texforce_cli.workflows.plan import Plan

_ARCHITECTURE = {
    "sd14": ("stable-diffusion-v1/lora", "sd_1.4"),
    "sd15": ("stable-diffusion-v1/lora", "sd_1.5"),
    "sd21": ("stable-diffusion-v2-768-v/lora", "sd_v2"),
    "sd21-base": ("stable-diffusion-v2-512/lora", "sd_v2"),
    "tiny": ("texforce-tiny/lora", "texforce_tiny"),
}


_PARTS = {"text-encoder": "text encoder", "unet": "U-Net", "both": "text encoder and the U-Net"}
_EMBEDDED = {"trained": "tuned", "snapshot": "tuned", "base": "base"}


def header(plan: Plan, images: int, weights: Mapping[str, Tensor]) -> dict[str, str]:
    """Metadata of the LoRA file: `texforce` (JSON), and the keys that other tools read. No date: same run, same bits."""
    config, source = plan.config, plan.source
    known = _ARCHITECTURE.get(source.name) if source.kind in ("tiny", "hub") else None
    architecture, base = known or _told_by(weights)
    about = {
        "base": source.location if source.kind == "hub" else source.name,
        "base_kind": source.kind,
        "base_hash": fingerprint(source),
        "train": config.train,
        "rewards": config.reward,
        "prompts": {"name": plan.prompts.name, "sha256": plan.prompts.sha256},
        "images": images,
        "steps": config.steps,
        "guidance": config.guidance,
        "eta": config.eta,
        "negative_prompt": config.negative_prompt,
        "uncond_embedding": config.uncond_embedding,
        "precision": config.precision,
        "seed": config.seed,
        "preset": config.preset,
        "texforce": __version__,
    }
    return {
        "texforce": json.dumps(about, sort_keys=True),
        "modelspec.sai_model_spec": "1.0.0",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": f"{'+'.join(config.reward)} on {source.short_name}",
        "modelspec.description": f"{config.train} trained with reinforcement learning (DDPO) by texforce",
        "ss_base_model_version": base,
        "ss_sd_model_name": source.short_name,
        "ss_network_dim": str(config.rank),
        "ss_network_alpha": str(config.rank),
        "ss_learning_rate": str(config.lr),
        "ss_seed": str(config.seed),
        "ss_steps": str(images // config.samples_per_epoch * config.updates_per_epoch),
    }


def _told_by(weights: Mapping[str, Tensor]) -> tuple[str, str]:
    """Architecture and base of a model that only its files know: SD 1.x and 2.x differ in the width of their texts."""
    text = (".q_proj.lora_A.weight", ".attn2.to_k.lora_A.weight")
    width = next((weight.shape[1] for name, weight in weights.items() if name.endswith(text)), 0)
    return ARCHITECTURES.get(GENERATIONS.get(width, ""), ("stable-diffusion/lora", ""))


def adapter_bytes(weights: Mapping[str, Tensor], plan: Plan, images: int) -> bytes:
    """The LoRA file (fp32, alpha = rank) of a run after `images`."""
    return lora_bytes(weights, header(plan, images, weights))


def write_adapter(
    folder: Path, lora: bytes, plan: Plan, row: Mapping[str, Any], evaluations: Sequence[Evaluation]
) -> None:
    """Write the LoRA file and its card."""
    write_bytes(folder / FILE_NAME, lora)
    write_text(folder / "README.md", _card(plan, row, evaluations))


def _card(plan: Plan, row: Mapping[str, Any], evaluations: Sequence[Evaluation]) -> str:
    config, source = plan.config, plan.source
    base = source.location if source.kind == "hub" else source.name
    measured = "Not measured on held-out prompts."
    if evaluations:
        last = evaluations[-1]
        d = last.difference
        measured = (
            f"After {last.images} images, on {d.n} held-out (prompt, seed) pairs the reward went from {last.base_mean:.4g} to {last.mean:.4g} "
            f"(paired difference {d.mean:+.4g}, 95 % interval {d.low:+.4g} to {d.high:+.4g})."
        )
    front = {"base_model": base, "library_name": "diffusers", "tags": ["lora", "texforce", "reinforcement-learning"]}
    lines = "\n".join(f"{key}: {json.dumps(value)}" for key, value in front.items())
    return f"""---
{lines}
---

# {" + ".join(config.reward)} on {base}

A LoRA of the {_PARTS[config.train]} (rank {config.rank}, alpha {config.rank}), trained with reinforcement learning (DDPO) on the reward `{" + ".join(config.reward)}` with texforce.

| | |
|---|---|
| base | `{base}` {json.dumps(fingerprint(source))} |
| prompts | `{plan.prompts.name}`, {len(plan.prompts.seen)} in training |
| images | {row["images"]} |
| sampling | {config.steps} DDIM steps, guidance {config.guidance:g}, eta {config.eta:g}, in {config.precision} |
| negative prompt | `{config.negative_prompt}`, embedded by the {_EMBEDDED[config.uncond_embedding]} encoder |
| seed | {config.seed} |

{measured} A rise of the reward says nothing about what the reward does not see: look at the pictures.

```python
from diffusers import StableDiffusionPipeline

pipeline = StableDiffusionPipeline.from_pretrained(BASE)
pipeline.load_lora_weights(FOLDER)  # this folder
```
"""
