"""U-Net and text encoder, trained together to predict v (or, as the second backbone, epsilon) on the latents."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from tools.tiny.tokenizer import LENGTH, text_options
from tools.tiny.training import Recipe, autocast, device, train

Prediction = Literal["v_prediction", "epsilon"]

RECIPE = Recipe("unet", steps=5_000, learning_rate=1.2e-3, muon=3e-3, hold=0.5, warmup=100, weight_decay=0.1)
BATCH = 64
_EMPTY = 0.1  # share of captions left empty, for guidance

_LARGEST_WEIGHT = 25.0

TIMESTEPS = 1300
"""Stable Diffusion's noise schedule goes on 300 steps longer. Where it ends, the picture's mean still shows (the signal
has 7 % of its amplitude at t = 999 and 12 % at t = 901, where ten leading steps begin), so that a network asked to begin
with pure noise sees a mean of zero and draws pale, confused pictures; at t = 1171 of 1300 two per cent are left."""
_BETA_START, _BETA_END, _SD_TIMESTEPS = 0.00085, 0.012, 1000


def _beta_end() -> float:
    """The last beta of the longer schedule: the square root grows by the same amount a step."""
    slope = (_BETA_END**0.5 - _BETA_START**0.5) / (_SD_TIMESTEPS - 1)
    return float((_BETA_START**0.5 + slope * (TIMESTEPS - 1)) ** 2)


def scheduler(prediction: Prediction = "v_prediction") -> DDIMScheduler:
    """The noise schedule, its first thousand steps those of Stable Diffusion."""
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        beta_schedule="scaled_linear",
        beta_start=_BETA_START,
        beta_end=_beta_end(),
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction,
    )


def weight(signal: torch.Tensor) -> torch.Tensor:
    """Of the squared error of the noise at the amplitude `signal` of the picture: that of v's squared error, 1 / signal², which is
    SNR + 1 over SNR (Salimans and Ho, 2022, sec. 4), up to a largest one. Equal weights hardly teach the layout, which is decided
    where the noise is nearly all that is there."""
    return (1 / signal**2).clamp(max=_LARGEST_WEIGHT)


def build(tokenizer: CLIPTokenizer) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Both networks, before training."""
    torch.manual_seed(0)
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            **text_options(tokenizer),
            hidden_size=128,
            intermediate_size=512,
            num_hidden_layers=3,
            num_attention_heads=4,
            projection_dim=128,
            hidden_act="quick_gelu",
        )
    )
    unet = UNet2DConditionModel(
        sample_size=16,
        in_channels=8,
        out_channels=8,
        layers_per_block=1,
        block_out_channels=(32, 128, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=128,
        attention_head_dim=(4, 4, 4),
        norm_num_groups=16,
    )
    return unet, text_encoder


def token_ids(tokenizer: CLIPTokenizer, captions: list[str]) -> torch.Tensor:
    """(n, 32) token ids, padded."""
    ids: torch.Tensor = tokenizer(
        captions, padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
    ).input_ids
    return ids


def train_unet(
    folder: Path,
    tokenizer: CLIPTokenizer,
    latents: torch.Tensor,
    captions: list[str],
    validation: tuple[torch.Tensor, list[str]],
    recipe: Recipe = RECIPE,
    prediction: Prediction = "v_prediction",
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Mean squared error of the prediction, the timesteps of a batch spread evenly, a tenth of the captions empty."""
    unet, text_encoder = build(tokenizer)
    unet.to(device(), memory_format=torch.channels_last).train()  # a tenth faster than the usual layout
    text_encoder.to(device()).train()
    # on a CPU the fused attention's backward pass takes a quarter of a step at 64 tokens, the plain one a tenth
    unet.set_attn_processor(AttnProcessor() if device().type == "cpu" else AttnProcessor2_0())
    alphas = scheduler().alphas_cumprod.to(device())
    ids = token_ids(tokenizer, captions).to(device())
    empty = token_ids(tokenizer, [""]).to(device())
    latents = latents.to(device())

    def loss(z: torch.Tensor, t: torch.Tensor, tokens: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        signal, sigma = alphas[t].sqrt()[:, None, None, None], (1 - alphas[t]).sqrt()[:, None, None, None]
        with autocast():
            output = unet(signal * z + sigma * noise, t, text_encoder(tokens).last_hidden_state).sample
        if prediction == "v_prediction":
            return F.mse_loss(output.float(), signal * noise - sigma * z)
        return (weight(signal) * (output.float() - noise) ** 2).mean()

    threads = 1 if device().type == "cuda" else min(2, torch.get_num_threads())

    def loss_of_step(part: int, generator: torch.Generator) -> torch.Tensor:
        picks = torch.randint(len(latents), (BATCH,), generator=generator).to(device())
        tokens = torch.where(torch.rand(BATCH, 1, generator=generator).to(device()) < _EMPTY, empty, ids[picks])
        spread = (torch.rand(1, generator=generator) + torch.arange(BATCH) / BATCH) % 1
        t = (spread * TIMESTEPS).long().clamp(0, TIMESTEPS - 1).to(device())
        noise = torch.randn((BATCH, *latents.shape[1:]), generator=generator).to(device())
        of_part = slice(part, None, threads)
        return loss(latents[picks[of_part]].float(), t[of_part], tokens[of_part], noise[of_part])

    held_latents, held_captions = validation
    held_ids = token_ids(tokenizer, held_captions).to(device())

    @torch.no_grad()
    def validate() -> float:
        generator = torch.Generator().manual_seed(1)
        losses = []
        for start in range(0, min(len(held_latents), 1024), BATCH):
            z = held_latents[start : start + BATCH].float().to(device())
            t = torch.randint(0, TIMESTEPS, (len(z),), generator=generator).to(device())
            noise = torch.randn(z.shape, generator=generator).to(device())
            losses.append(loss(z, t, held_ids[start : start + len(z)], noise))
        return float(torch.stack(losses).mean())

    parts = [partial(loss_of_step, part) for part in range(threads)]
    train(recipe, {"unet": unet, "text_encoder": text_encoder}, parts, folder, validate=validate)
    unet.to(memory_format=torch.contiguous_format).set_attn_processor(AttnProcessor2_0())
    return unet, text_encoder
