"""The two judges: contrastive models of pictures and captions that share neither architecture, seed nor pictures.

`tiny-clip` is a CLIPModel (a vision transformer on 8x8 patches); `tiny-judge` a VisionTextDualEncoderModel (ConvNeXt and
BERT). Each caption of a batch meets a neighbour that differs in one attribute, so that details count.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    BertConfig,
    CLIPConfig,
    CLIPModel,
    CLIPTokenizer,
    ConvNextConfig,
    PreTrainedModel,
    VisionTextDualEncoderConfig,
    VisionTextDualEncoderModel,
)

from tools.tiny.pictures import Pictures
from tools.tiny.tokenizer import LENGTH, text_options
from tools.tiny.training import Recipe, autocast, device, train
from tools.tiny.unet import token_ids
from tools.tiny.vae import normalised
from tools.tiny.world import KINDS, caption, changes

_COMMON: dict[str, Any] = {
    "steps": 1300,
    "learning_rate": 1e-3,
    "muon": 2e-3,
    "hold": 0.45,
    "weight_decay": 0.02,
    "beta2": 0.98,
    "ema": 0.995,
}
CLIP_RECIPE = Recipe("clip", **_COMMON, seed=1)
JUDGE_RECIPE = Recipe("judge", **_COMMON, seed=2)
SCENES: dict[str, Any] = {"held": None, "shares": {**KINDS, "composition": 0.4}, "tinted_pairs": 0.5}
"""What the judges' pictures show: more pairs than the model's, half of them tinted, which are the hardest to read."""

_BATCH = 128
_GRAIN = 0.05  # most noise on a picture, of a range of 2


def build_clip(tokenizer: CLIPTokenizer) -> PreTrainedModel:
    """`tiny-clip`, before training."""
    torch.manual_seed(1)
    common = {"hidden_size": 128, "intermediate_size": 384, "num_attention_heads": 4}
    text = {**common, **text_options(tokenizer), "num_hidden_layers": 2}
    vision = {**common, "num_hidden_layers": 4, "image_size": 64, "patch_size": 8}
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=128))


def build_judge(tokenizer: CLIPTokenizer) -> PreTrainedModel:
    """`tiny-judge`, before training."""
    torch.manual_seed(2)
    vision = ConvNextConfig(
        num_channels=3, patch_size=4, num_stages=3, hidden_sizes=[48, 96, 192], depths=[2, 2, 2], image_size=64
    )
    vision.hidden_size = 192  # what VisionTextDualEncoderModel projects from
    text = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=LENGTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        pad_token_id=tokenizer.pad_token_id,
    )
    config = VisionTextDualEncoderConfig.from_vision_text_configs(vision, text, projection_dim=96)
    return VisionTextDualEncoderModel(config)


def train_judge(
    folder: Path,
    recipe: Recipe,
    build: Callable[[CLIPTokenizer], PreTrainedModel],
    tokenizer: CLIPTokenizer,
    vae: AutoencoderTiny,
    pictures: Pictures,
) -> PreTrainedModel:
    """Symmetric cross-entropy over a batch of pictures, their captions and as many captions with one attribute changed;
    half of the pictures went through the VAE, all have a little noise, so that drawn ones are not strange to it."""
    model = build(tokenizer).to(device()).train()
    images = torch.from_numpy(pictures.images.copy())
    _through_vae(vae, images[1::2])
    plain = [caption(scene) for scene in pictures.scenes]

    def loss_of_step(generator: torch.Generator) -> torch.Tensor:
        picks = torch.randint(len(images), (_BATCH,), generator=generator)
        rng = random.Random(int(torch.randint(2**62, (1,), generator=generator)))
        scenes = [pictures.scenes[i] for i in picks.tolist()]
        near = [rng.choice(list(changes(scene, rng).values())) for scene in scenes]
        texts = [caption(scene, rng) for scene in [*scenes, *near]]
        x = normalised(images[picks])
        grain = _GRAIN * torch.rand((_BATCH, 1, 1, 1), generator=generator)
        x = (x + grain * torch.randn(x.shape, generator=generator)).to(device())
        # the backward of the fused attention takes two thirds of a CPU's step
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            seen = F.normalize(model.get_image_features(pixel_values=x).pooler_output.float(), dim=-1)
            ids = token_ids(tokenizer, texts).to(device())
            read = F.normalize(model.get_text_features(input_ids=ids).pooler_output.float(), dim=-1)
        logits = model.logit_scale.exp().clamp(max=100) * seen @ read.T
        said = [plain[i] for i in picks.tolist()]
        twins = torch.tensor([[a == b for b in said] for a in said], device=device())
        twins &= ~torch.eye(_BATCH, dtype=torch.bool, device=device())
        target = torch.arange(_BATCH, device=device())
        by_picture = logits.masked_fill(torch.cat([twins, torch.zeros_like(twins)], 1), -1e4)
        by_caption = logits[:, :_BATCH].T.masked_fill(twins, -1e4)
        return (F.cross_entropy(by_picture, target) + F.cross_entropy(by_caption, target)) / 2

    train(recipe, {recipe.name: model}, [loss_of_step], folder)
    return model


@torch.no_grad()
def _through_vae(vae: AutoencoderTiny, images: torch.Tensor) -> None:
    """Replace uint8 (n, 64, 64, 3) pictures by their reconstructions, in place."""
    for part in images.split(128):
        with autocast():
            again = vae.decode(vae.encode(normalised(part).to(device())).latents).sample
        part.copy_(((again.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu())
