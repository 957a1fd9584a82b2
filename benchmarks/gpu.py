"""Stable Diffusion 1.5 on a GPU, with random weights: seconds, memory and the share of what the device can multiply.

python -m benchmarks.gpu --out FILE.json                # bf16, micro-batches 1 to 32, a warm-up and two epochs each
python -m benchmarks.gpu --size small --device cpu --precision fp32 --micro-batches 1,2 --steps 2    # does it run?

Weights do not change speed, so none are fetched. An epoch is that of `texforce train`: text encoder, guidance 5, half of the
steps trained, two micro-batches of images or `--images`, whose latents are kept until they are learnt from. The floor beside it is the same U-Net passes and nothing else.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.floor import Floor
from texforce_cli.config import TrainConfig, resolve
from texforce_cli.devices import claim, same_bits
from texforce_cli.files import write_json
from texforce_cli.prompts import Prompt
from texforce_cli.rewards.registry import load_registry
from texforce_cli.tiny import WEIGHTS
from texforce_cli.workflows.assembly import make_adapter, make_algorithm, make_optimisation, make_policy, make_rewards
from texforce_cli.workflows.cost import memory_of
from texforce_cli.workflows.run_folder import versions

_PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_CHANNELS = {"sd15": ((320, 640, 1280, 1280), (128, 256, 512, 512), 768), "small": ((32, 64, 64, 64), (32,) * 4, 64)}


def scheduler() -> DDIMScheduler:
    """That of Stable Diffusion 1.5."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def pipeline_of(size: str, device: torch.device, dtype: torch.dtype) -> StableDiffusionPipeline:
    """A Stable Diffusion 1.5 with random weights; `small` has its layers with few channels and 64-pixel pictures."""
    torch.manual_seed(0)
    channels, vae_channels, width = _CHANNELS[size]
    side = 64 if size == "sd15" else 8
    with device:
        unet = UNet2DConditionModel(sample_size=side, block_out_channels=channels, cross_attention_dim=width)
    vae = AutoencoderKL(
        block_out_channels=vae_channels,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        sample_size=8 * side,
    )
    text = CLIPTextConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=12 if size == "sd15" else 2,
        num_attention_heads=width // 64,
    )
    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(WEIGHTS / "tokenizer", model_max_length=77),
        unet=unet,
        scheduler=scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(device, dtype)
    for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder):
        part.requires_grad_(False).eval()
    pipeline.vae.enable_slicing()
    for part in (pipeline.unet, pipeline.vae):
        part.to(memory_format=torch.channels_last)
    return pipeline


def peak_teraflops(device: torch.device, dtype: torch.dtype, side: int) -> float:
    """What a multiplication of two square matrices reaches, the best of ten."""
    a, b = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        a @ b
        _wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * side**3 / min(seconds) / 1e12


def measured(pipeline: StableDiffusionPipeline, config: TrainConfig, rounds: int, peak: float) -> dict[str, Any]:
    """Medians over `rounds` epochs after one that warms up; raises torch.OutOfMemoryError where there is no room."""
    device = torch.device(config.device)
    adapter = make_adapter(pipeline, config)
    policy = make_policy(pipeline, config, adapter)
    algorithm = make_algorithm(
        config,
        policy,
        make_rewards(config, load_registry()),
        make_optimisation(config, policy),
        [Prompt("a cat"), Prompt("a dog")],
        lambda *about, **more: None,
    )
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    epochs = [algorithm.run_epoch(index) for index in range(rounds + 1)]
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None
    if any("too full" in text for epoch in epochs for text in epoch.warnings):
        raise torch.OutOfMemoryError
    images, size, trained = config.samples_per_epoch, pipeline.vae.config.sample_size, config.steps // 2
    floor = Floor(
        policy,
        images=images,
        micro_batch=config.micro_batch,
        steps=config.steps,
        trained=trained,
        branches=config.branches,
    )
    floor.run()
    floors = [floor.run() for _ in range(rounds)]
    total = statistics.median(sum(epoch.seconds.values()) for epoch in epochs[1:])
    least = statistics.median(one["total"] for one in floors)
    work = sum(floor.gigaflop().values()) / 1000
    return {
        "micro_batch": config.micro_batch,
        "seconds": {p: statistics.median(epoch.seconds[p] for epoch in epochs[1:]) for p in epochs[0].seconds},
        "epoch_over_floor": total / least,
        "images_per_second": images / total,
        "share_of_peak": work / total / peak,
        "memory_gb": memory,
        "predicted_memory_gb": memory_of(config, size).gb(config.micro_batch),
    }


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--device", default="cuda")
    p.add_argument("--size", choices=tuple(_CHANNELS), default="sd15")
    p.add_argument("--precision", choices=tuple(_PRECISIONS), default="bf16")
    p.add_argument("--micro-batches", default="1,2,4,8,16,32")
    p.add_argument("--steps", type=int, default=20, help="denoising steps, half of them trained (20)")
    p.add_argument("--images", type=int, help="images an epoch, a multiple of every micro-batch (two micro-batches)")
    p.add_argument("--rounds", type=int, default=2)
    p.add_argument("--out", type=Path, help="JSON file for everything that was measured")
    a = p.parse_args(argv)
    device, dtype = torch.device(a.device), _PRECISIONS[a.precision]
    claim(a.device)
    same_bits()  # as a run does
    peak = peak_teraflops(device, dtype, 8192 if device.type == "cuda" else 512)
    rows: list[Mapping[str, Any]] = []
    print(
        f"{torch.cuda.get_device_name(device) if device.type == 'cuda' else a.device}, {a.precision}, peak {peak:.1f} TFLOP/s"
    )
    print(f"{'micro-batch':>11}{'images/s':>10}{'epoch/floor':>13}{'of peak':>9}{'GB':>8}{'predicted':>11}")
    for micro_batch in map(int, a.micro_batches.split(",")):
        images = a.images or 2 * micro_batch
        config = resolve(
            {
                "reward": ["brightness"],
                "preset": "many",
                "device": a.device,
                "precision": a.precision,
                "steps": a.steps,
                "train_steps": "random:0.5",
                "samples_per_epoch": images,
                "micro_batch": micro_batch,
                "grad_accum": 1,
                "timestep_batch": 1,
                "images": images * (a.rounds + 1),
                "advantages": "batch",
                "group_size": 1,
            },
            family="sd",
        ).config
        try:
            row = measured(pipeline_of(a.size, device, dtype), config, a.rounds, peak)
        except torch.OutOfMemoryError:
            print(f"{micro_batch:>11}{'no room':>10}")
            break
        rows.append(row)
        memory = "" if row["memory_gb"] is None else f"{row['memory_gb']:.1f}"
        print(
            f"{micro_batch:>11}{row['images_per_second']:>10.3f}{row['epoch_over_floor']:>13.3f}{row['share_of_peak']:>9.1%}"
            f"{memory:>8}{row['predicted_memory_gb']:>11.1f}"
        )
    result = {"benchmark": "gpu", **vars(a), "out": None, "peak_teraflops": peak, "versions": versions(), "rows": rows}
    if a.out:
        write_json(a.out, result)
    return result


if __name__ == "__main__":
    main()
