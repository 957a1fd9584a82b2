"""`python -m tools.tiny FOLDER`: make the embedded model and its judges from nothing, measure them, install them.

Every stage leaves its result in FOLDER and is passed over when it is there; a stage that was interrupted continues from
its checkpoint. Fixed steps and seeds: on a CPU the same machine and number of threads gives the same bits.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderTiny, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTokenizer

from texforce_cli import tiny
from texforce_cli.core.seeds import derive
from texforce_cli.files import write_bytes
from texforce_cli.rewards.builtin.emoji import Agreement
from tools.tiny import judges, unet, vae
from tools.tiny.measure import CAPABILITIES, Draw, real, table
from tools.tiny.pictures import pictures
from tools.tiny.tokenizer import build_tokenizer
from tools.tiny.training import Recipe, device
from tools.tiny.vae import normalised, psnr
from tools.tiny.world import Scene, caption


@dataclass(frozen=True)
class Scale:
    """How many pictures each stage sees; `steps` overrides every recipe's (the smoke form)."""

    train: int = 60_000
    validation: int = 4_000
    judge: int = 40_000
    measured: int = 300
    steps: int | None = None

    def recipe(self, recipe: Recipe) -> Recipe:
        """`recipe` with this scale's number of steps."""
        return replace(recipe, steps=self.steps) if self.steps else recipe


SMOKE = Scale(train=200, validation=64, judge=200, measured=4, steps=3)


def build(folder: Path, scale: Scale, prediction: unet.Prediction) -> None:
    """Pictures, tokenizer, VAE, latents, U-Net with text encoder, judges: `folder`/{weights,clip,judge}, fp16.

    The second backbone has a U-Net and a text encoder of its own; VAE, words and judges are those of the package.
    """
    second = prediction == "epsilon"
    folder.mkdir(parents=True, exist_ok=True)
    seen = pictures(folder, "train", scale.train, 0, held=False)
    unseen = pictures(folder, "validation", scale.validation, 0, held=False)
    if second:
        tokenizer = CLIPTokenizer.from_pretrained(tiny.WEIGHTS / "tokenizer")
        autoencoder = AutoencoderTiny.from_pretrained(tiny.WEIGHTS / "vae", torch_dtype=torch.float32).to(device())
    else:
        tokenizer = build_tokenizer(folder / "tokenizer")
        autoencoder = vae.train_vae(folder, seen, unseen, scale.recipe(vae.RECIPE))
    recipe = scale.recipe(unet.RECIPE)
    network, text_encoder = unet.train_unet(
        folder,
        tokenizer,
        vae.latents(folder, "train", autoencoder, seen),
        seen.captions,
        (vae.latents(folder, "validation", autoencoder, unseen), [caption(scene) for scene in unseen.scenes]),
        replace(recipe, name=f"unet-{prediction}") if second else recipe,
        prediction,
    )
    pipeline = StableDiffusionPipeline(
        vae=autoencoder,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=network,
        scheduler=unet.scheduler(prediction),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.to(torch.float16).save_pretrained(folder / "weights")
    _with_level(folder / "weights" / "text_encoder" / "model.safetensors")
    if second:
        return
    autoencoder.float()
    for name, judge_recipe, make in (
        ("clip", judges.CLIP_RECIPE, judges.build_clip),
        ("judge", judges.JUDGE_RECIPE, judges.build_judge),
    ):
        drawn = pictures(folder, name, scale.judge, judge_recipe.seed, **judges.SCENES)
        model = judges.train_judge(folder, scale.recipe(judge_recipe), make, tokenizer, autoencoder, drawn)
        model.half().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)


def _with_level(file: Path) -> None:
    """Keys with the level `text_model.`, as in every published file: transformers < 5.6 finds no others."""
    level = "text_model."
    weights = {level + key.removeprefix(level): value for key, value in load_file(file).items()}
    save_file(weights, file, metadata={"format": "pt"})


def measure(folder: Path, scale: Scale) -> dict[str, Any]:
    """The table of the model card, from the files in `folder`, and `samples.png`: a row for each capability."""
    pipeline = StableDiffusionPipeline.from_pretrained(
        folder / "weights", safety_checker=None, torch_dtype=torch.float32
    ).to(device())
    pipeline.set_progress_bar_config(disable=True)
    places = [own if (own := folder / shipped.name).exists() else shipped for shipped in (tiny.CLIP, tiny.JUDGE)]
    both = dict(zip(("tiny-clip", "tiny-judge"), map(Agreement, places)))
    draws: dict[str, Draw] = {f"guidance {scale_:g}": _drawer(pipeline, scale_) for scale_ in (1.0, 3.0)}
    rows = [[caption(scene) for scene in capability.scenes(12, seed=5)] for capability in CAPABILITIES]
    _grid(np.stack([draws["guidance 3"](row) for row in rows])).save(folder / "samples.png")
    (folder / "samples.txt").write_text("\n".join("; ".join(row) for row in rows) + "\n", encoding="utf-8")
    milliseconds = {}
    for name, draw in draws.items():
        started = time.perf_counter()
        draw(rows[0] * 2)
        milliseconds[name] = round((time.perf_counter() - started) / len(rows[0] * 2) * 1000, 1)
    return {
        "pictures a capability": scale.measured,
        "steps": _STEPS,
        "accuracy": table(both, draws, scale.measured),
        "milliseconds an image": milliseconds,
        "milliseconds a picture and call of the U-Net": round(_call(pipeline), 1),
        "PSNR of the autoencoder, dB": round(
            psnr(pipeline.vae, normalised(torch.from_numpy(real(_plain_scenes())))), 1
        ),
        "threads": torch.get_num_threads(),
        "peak memory MB": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


_STEPS = 20


@torch.no_grad()
def _call(pipeline: StableDiffusionPipeline) -> float:
    """Milliseconds a picture of one call of the U-Net in fp32, 32 pictures at once; the median of nine."""
    sample = torch.zeros(32, 8, 16, 16, device=device())
    words = torch.zeros(32, 32, pipeline.unet.config.cross_attention_dim, device=device())
    seconds = []
    for _ in range(9):
        started = time.perf_counter()
        pipeline.unet(sample, 500, words).sample.sum().item()
        seconds.append(time.perf_counter() - started)
    return 1000 * statistics.median(seconds) / 32


def _plain_scenes() -> list[Scene]:
    return [scene for capability in CAPABILITIES for scene in capability.scenes(64)]


def _drawer(pipeline: StableDiffusionPipeline, guidance: float) -> Callable[[list[str]], np.ndarray]:
    def draw(captions: list[str]) -> np.ndarray:
        parts = []
        for start in range(0, len(captions), 32):
            part = captions[start : start + 32]
            seeds = [torch.Generator().manual_seed(derive(6, start + i)) for i in range(len(part))]
            images = pipeline(
                part, num_inference_steps=_STEPS, guidance_scale=guidance, eta=1.0, generator=seeds, output_type="np"
            ).images
            parts.append((images * 255).round().astype(np.uint8))
        return np.concatenate(parts)

    return draw


def _grid(images: np.ndarray) -> Image.Image:
    """uint8 (rows, columns, 64, 64, 3) as one picture, doubled, two pixels between."""
    rows, columns = images.shape[:2]
    canvas = np.full((rows, 66, columns, 66, 3), 255, np.uint8)
    canvas[:, 1:65, :, 1:65] = images.transpose(0, 2, 1, 3, 4)
    picture = Image.fromarray(canvas.reshape(rows * 66, columns * 66, 3))
    return picture.resize((picture.width * 2, picture.height * 2), Image.Resampling.NEAREST)


def install(folder: Path, version: str) -> None:
    """Copy the weights of `folder` and what was measured of them into the package, and write the manifest."""
    for name in ("weights", "clip", "judge"):
        target = tiny.WEIGHTS.parent / name
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(folder / name, target)
    write_bytes(tiny.MANIFEST.with_name("measured.json"), (folder / "measured.json").read_bytes())
    manifest = {"version": version, "sha256": tiny.weights_sha256()}
    write_bytes(tiny.MANIFEST, (json.dumps(manifest, indent=2) + "\n").encode())


def main(arguments: list[str]) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tools.tiny", description=__doc__)
    parser.add_argument("folder", type=Path, help="where everything is made")
    parser.add_argument("--smoke", action="store_true", help="three steps of everything: does it run?")
    parser.add_argument("--epsilon", action="store_true", help="the second backbone, which predicts the noise")
    parser.add_argument("--threads", type=int, help="CPU threads (by default those of PyTorch)")
    parser.add_argument("--install", metavar="VERSION", help="copy the result into the package, as this version")
    options = parser.parse_args(arguments)
    if options.install and options.epsilon:
        parser.error("the package holds the first backbone alone: leave out --install")
    if options.install and options.smoke:
        parser.error("three steps of everything, --smoke, are not for the package: leave out --install or --smoke")
    if options.threads:
        torch.set_num_threads(options.threads)
    scale = SMOKE if options.smoke else Scale()
    build(options.folder, scale, "epsilon" if options.epsilon else "v_prediction")
    figures = measure(options.folder, scale)
    text = json.dumps(figures, indent=2)
    write_bytes(options.folder / "measured.json", (text + "\n").encode())
    print(text)
    if options.install:
        install(options.folder, options.install)


if __name__ == "__main__":
    main(sys.argv[1:])
