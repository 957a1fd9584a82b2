"""Models of Stable Diffusion's topology that are made in a moment."""

from __future__ import annotations

from typing import Any

import diffusers
import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from texforce_cli import tiny
from texforce_cli.diffusion import single_file


def small_pipeline(width: int = 32, vocabulary: int = 846, length: int = 32, **unet: Any) -> Any:
    """Stable Diffusion's topology with few channels and random weights, with the embedded model's tokenizer."""
    torch.manual_seed(width)
    text = CLIPTextConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=length,
        bos_token_id=vocabulary - 2,
        eos_token_id=vocabulary - 1,
        pad_token_id=vocabulary - 1,
    )
    channels = {"down_block_types": ["DownEncoderBlock2D"] * 4, "up_block_types": ["UpDecoderBlock2D"] * 4}
    return diffusers.StableDiffusionPipeline(
        unet=diffusers.UNet2DConditionModel(
            sample_size=8,
            block_out_channels=[8, 16, 16, 16],
            cross_attention_dim=width,
            norm_num_groups=8,
            attention_head_dim=2,
            **unet,
        ),
        vae=diffusers.AutoencoderKL(
            block_out_channels=[8, 8, 16, 16], layers_per_block=2, latent_channels=4, norm_num_groups=8, **channels
        ),
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(tiny.WEIGHTS / "tokenizer"),
        scheduler=diffusers.PNDMScheduler.from_pretrained(single_file.CONFIGS / "sd1" / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
