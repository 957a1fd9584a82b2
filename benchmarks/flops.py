"""Operations of Stable Diffusion's networks, counted by PyTorch on the meta device: no weights, no arithmetic, some seconds.

    python -m benchmarks.flops

The table of docs/scaling.md. Two operations a multiply-add; attention is counted, activations and norms are not.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel

STEPS, TRAINED, BRANCHES = 50, 25, 2
"""The paper's: half of the steps are trained, with guidance."""


@dataclass(frozen=True)
class Backbone:
    """The configuration of each network; `side` of the latents, a text encoder is (width, layers, heads)."""

    name: str
    side: int
    unet: dict[str, Any]
    text_encoders: tuple[tuple[int, int, int], ...]

    @property
    def extra(self) -> dict[str, torch.Tensor]:
        """What SDXL's U-Net is given beside the text: pooled embedding and sizes."""
        return {"text_embeds": torch.empty(1, 1280), "time_ids": torch.empty(1, 6)}


SD15 = Backbone(
    "SD 1.5, 512 pixels", 64, {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}, ((768, 12, 12),)
)
SDXL = Backbone(
    "SDXL, 1024 pixels",
    128,
    {
        "sample_size": 128,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "cross_attention_dim": 2048,
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
    ((768, 12, 12), (1280, 32, 20)),
)


def teraflop(work: Callable[[], object]) -> float:
    """What `work` computes."""
    with FlopCounterMode(display=False) as counted:
        work()
    return counted.get_total_flops() / 1e12


def unet(of: Backbone) -> tuple[float, float]:
    """A call for one image and branch, and its backward to the text embeddings with the network frozen."""
    network = UNet2DConditionModel(**of.unet).requires_grad_(False)
    latents = torch.empty(1, 4, of.side, of.side)
    text = torch.empty(1, 77, of.unet["cross_attention_dim"], requires_grad=True)
    made: list[torch.Tensor] = []
    call = teraflop(lambda: made.append(network(latents, 1, text, added_cond_kwargs=of.extra).sample))
    return call, teraflop(lambda: made[0].sum().backward())


def decoder(of: Backbone) -> float:
    """The VAE's, for one image."""
    channels = (128, 256, 512, 512)
    vae = AutoencoderKL(
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
    )
    return teraflop(lambda: vae.decode(torch.empty(1, 4, of.side, of.side)))


def texts(of: Backbone) -> float:
    """All text encoders, one prompt, forward and backward through every layer."""

    def encode() -> None:
        for width, layers, heads in of.text_encoders:
            config = CLIPTextConfig(
                hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=heads
            )
            ids = torch.zeros(1, 77, dtype=torch.long)
            CLIPTextModel(config)(ids).last_hidden_state.sum().backward()

    return teraflop(encode)


def table() -> str:
    """In Markdown."""
    with torch.device("meta"):
        columns = []
        for of in (SD15, SDXL):
            call, backward = unet(of)
            drawing, decoding = STEPS * BRANCHES * call, decoder(of)
            learning = TRAINED * BRANCHES * (call + backward)
            columns.append([call, backward, drawing, decoding, learning, texts(of), drawing + decoding + learning])
    labels = (
        "U-Net, one image and branch, forward",
        "the same, backward to the text embeddings",
        f"sampling: {STEPS} steps x {BRANCHES} branches",
        "VAE decoder",
        f"training: {TRAINED} steps x {BRANCHES} branches, forward and backward",
        "text encoders",
        "an image, drawn and learnt from",
    )
    lines = [f"| TFLOP | {SD15.name} | {SDXL.name} |", "|---|---|---|"]
    for label, *values in zip(labels, *columns, strict=True):
        cells = (
            f"{value:.0f}" if value >= 100 else f"{value:.2g}" if value < 0.1 else f"{value:.3g}" for value in values
        )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())
