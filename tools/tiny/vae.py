"""The VAE: AutoencoderTiny (f = 4, 8 latent channels), trained on 32x32 crops; and the latents of all pictures."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file, save_file

from texforce_cli.files import atomic_path
from tools.tiny.pictures import Pictures
from tools.tiny.training import Recipe, autocast, device, train

RECIPE = Recipe("vae", steps=5000, learning_rate=2e-3, warmup=100, weight_decay=1e-4, ema=0.995)
_BATCH, _CROP, _NOISE = 32, 32, 0.03


def normalised(images: torch.Tensor) -> torch.Tensor:
    """uint8 (n, h, w, 3) to float (n, 3, h, w) in [-1, 1]."""
    return images.permute(0, 3, 1, 2).float() / 127.5 - 1


def build() -> AutoencoderTiny:
    """The network, before training."""
    torch.manual_seed(0)
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(1, 1, 2),
        num_decoder_blocks=(2, 1, 1),
        latent_channels=8,
        upsampling_scaling_factor=2,
    )


def _gradients(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., :, 1:] - x[..., :, :-1]


def train_vae(folder: Path, train_set: Pictures, validation: Pictures, recipe: Recipe = RECIPE) -> AutoencoderTiny:
    """L1 + 2 L2 + half the L1 of the gradients, latents with noise; its scaling factor makes latents unit variance."""
    vae = build().to(device(), memory_format=torch.channels_last)
    images = torch.from_numpy(train_set.images)  # read-only map: only read from

    def loss_of_step(generator: torch.Generator) -> torch.Tensor:
        picks = torch.randint(len(images), (_BATCH,), generator=generator).tolist()
        corners = torch.randint(64 - _CROP + 1, (_BATCH, 2), generator=generator).tolist()
        crops = [images[i, a : a + _CROP, b : b + _CROP] for i, (a, b) in zip(picks, corners, strict=True)]
        x = normalised(torch.stack(crops)).to(device())
        if torch.rand(1, generator=generator) < 0.5:
            x = x.flip(-1)
        with autocast():
            z = vae.encoder(x).float()
            y = vae.decoder(z + _NOISE * torch.randn(z.shape, generator=generator).to(z)).float()
        rough = sum((a - b).abs().mean() for a, b in zip(_gradients(y), _gradients(x), strict=True))
        return (y - x).abs().mean() + 2 * (y - x).pow(2).mean() + 0.5 * rough + 1e-3 * z.pow(2).mean()

    real = normalised(torch.from_numpy(validation.images[:512]))
    train(recipe, {"vae": vae}, [loss_of_step], folder, validate=lambda: psnr(vae, real), validations=10)
    with torch.no_grad():
        latents = torch.cat([vae.encode(part.to(device())).latents for part in real.split(64)])
    vae.register_to_config(scaling_factor=float(1 / latents.std()))
    vae.to(memory_format=torch.contiguous_format)
    return vae


@torch.no_grad()
def psnr(vae: AutoencoderTiny, images: torch.Tensor) -> float:
    """Mean over pictures (in [-1, 1]) of the peak signal-to-noise ratio of the reconstruction, dB."""
    parts = []
    for part in images.split(64):
        part = part.to(device())
        again = vae.decode(vae.encode(part).latents).sample.clamp(-1, 1)
        parts.append(-10 * torch.log10(((again - part) / 2).pow(2).flatten(1).mean(1)))
    return float(torch.cat(parts).mean())


@torch.no_grad()
def latents(folder: Path, name: str, vae: AutoencoderTiny, images: Pictures) -> torch.Tensor:
    """Scaled latents fp16 (n, 8, 16, 16) of all pictures: from `folder`, else encoded."""
    path = folder / f"{name}.latents.safetensors"
    if not path.exists():
        parts = []
        for part in torch.from_numpy(images.images).split(128):
            with autocast():
                encoded = vae.encode(normalised(part).to(device())).latents
            parts.append((encoded.float() * vae.config.scaling_factor).half().cpu())
        with atomic_path(path) as temporary:
            save_file({"latents": torch.cat(parts).contiguous()}, temporary)
    return load_file(path)["latents"]
