"""One arm of the benchmark: TRL's DDPOTrainer, a U-Net LoRA trained on the JPEG size of the pictures, on the CPU.

python run.py --model FOLDER --prompts-file FILE.txt --epochs 2 --out FILE.jsonl
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import json
import logging
import os
import random
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["DIFFUSERS_VERBOSITY"] = os.environ["TRANSFORMERS_VERBOSITY"] = "error"
PACKAGES = ("trl", "torch", "diffusers", "transformers", "peft", "accelerate", "pillow", "numpy")
TRL_RANK = 4


def arguments(argv: list[str] | None = None) -> argparse.Namespace:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    p.add_argument("--model", type=Path, required=True, help="folder of a diffusers StableDiffusionPipeline")
    p.add_argument("--prompts-file", type=Path, required=True, help="one prompt a line")
    p.add_argument("--epochs", type=int, default=1, help="not used with --serve")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--samples-per-epoch", type=int, default=256)
    p.add_argument("--sample-batch", type=int, default=32)
    p.add_argument("--train-batch", type=int, default=32)
    p.add_argument("--steps", type=int, default=10, help="denoising steps")
    p.add_argument("--guidance", type=float, default=1.0)
    p.add_argument(
        "--branches",
        choices=("auto", "two"),
        default="auto",
        help="at guidance 1: auto leaves the unconditional branch out, two computes it as TRL does by default",
    )
    p.add_argument("--lr", type=float, default=1e-2)
    p.add_argument("--rank", type=int, default=TRL_RANK, help="of the LoRA; its alpha is the same")
    p.add_argument("--updates-per-epoch", type=int, default=4)
    p.add_argument("--timestep-fraction", type=float, default=0.4)
    p.add_argument("--clip-range", type=float, default=8e-4)
    p.add_argument(
        "--advantages",
        choices=("global", "prompt"),
        default="global",
        help="global: over the epoch's pictures (TRL's default); prompt: TRL's per-prompt tracker",
    )
    p.add_argument("--buffer-size", type=int, default=16, help="of the per-prompt tracker")
    p.add_argument("--min-count", type=int, default=16, help="of the per-prompt tracker")
    p.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="bf16 is TRL's mixed precision")
    p.add_argument("--threads", type=int, default=2)
    p.add_argument("--out", type=Path, help="file for the JSON lines; they go to stdout as well")
    p.add_argument("--serve", action="store_true", help="run one epoch for each line 'epoch' on stdin, until 'quit'")
    a = p.parse_args(argv)
    if a.guidance < 1:
        p.error("--guidance must be 1 or more: TRL has no unconditional-only sampling")
    if a.samples_per_epoch % a.sample_batch or a.sample_batch % a.train_batch:
        p.error("--samples-per-epoch must be a multiple of --sample-batch, and that of --train-batch")
    if a.updates_per_epoch < 1 or a.samples_per_epoch // a.train_batch % a.updates_per_epoch:
        p.error("--updates-per-epoch must divide the number of train batches in an epoch")
    if int(a.steps * a.timestep_fraction) < 1:
        p.error("--timestep-fraction leaves no timestep to train on")
    return a


def older_layout(model: Path, into: Path) -> Path:
    """A copy of the model folder that transformers 4 reads: see 'What is adapted' in the README."""
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(model, into / "model"))
    if not (folder / "tokenizer" / "vocab.json").exists():
        index = json.loads((folder / "model_index.json").read_text())
        index["tokenizer"] = ["transformers", "CLIPTokenizerFast"]
        (folder / "model_index.json").write_text(json.dumps(index))
    weights = folder / "text_encoder" / "model.safetensors"
    tensors = load_file(weights)
    if not any(key.startswith("text_model.") for key in tensors):
        weights.unlink()
        save_file({f"text_model.{key}": value for key, value in tensors.items()}, weights, metadata={"format": "pt"})
    return folder


def jpeg_kilobytes(images: Any, prompts: Any, metadata: Any) -> tuple[Any, dict[str, Any]]:
    """TRL's reward signature; `images` lie in 0..1, channels first."""
    import torch
    from PIL import Image

    sizes = []
    for pixels in (images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, "JPEG", quality=95)
        sizes.append(file.tell() / 1000)
    return torch.tensor(sizes), {}


def load_pipeline(model: Path, rank: int, one_branch: bool) -> Any:
    from peft import LoraConfig
    from trl import DefaultDDPOStableDiffusionPipeline

    class Pipeline(DefaultDDPOStableDiffusionPipeline):
        def get_trainable_layers(self) -> Any:
            if rank == TRL_RANK:
                return super().get_trainable_layers()
            targets = ["to_q", "to_k", "to_v", "to_out.0"]
            self.unet.add_adapter(
                LoraConfig(r=rank, lora_alpha=rank, init_lora_weights="gaussian", target_modules=targets)
            )
            return self.unet

    with tempfile.TemporaryDirectory() as folder:
        pipeline = Pipeline(str(older_layout(model, Path(folder))), use_lora=True)
    if one_branch:
        pipeline.sd_pipeline._encode_prompt = lambda *_, prompt_embeds, **__: prompt_embeds
    return pipeline


class Arm:
    """The trainer, with a clock around its phases."""

    def __init__(self, a: argparse.Namespace) -> None:
        import torch
        from accelerate import PartialState
        from trl import DDPOConfig, DDPOTrainer

        torch.set_num_threads(a.threads)
        PartialState(cpu=True)
        prompts = [line.strip() for line in a.prompts_file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if not prompts:
            raise SystemExit(f"{a.prompts_file}: no prompts")
        draw = random.Random(a.seed)
        two = a.guidance > 1 or a.branches == "two"
        # TRL takes the two branches only above 1; in float32 this is still a guidance of 1 to one part in a million
        guidance = max(a.guidance, 1 + 1e-6) if two else a.guidance
        config = DDPOConfig(
            seed=a.seed,
            num_epochs=a.epochs,
            save_freq=sys.maxsize,
            mixed_precision="bf16" if a.precision == "bf16" else "no",
            accelerator_kwargs={"cpu": True},
            sample_num_steps=a.steps,
            sample_eta=1.0,
            sample_guidance_scale=guidance,
            sample_batch_size=a.sample_batch,
            sample_num_batches_per_epoch=a.samples_per_epoch // a.sample_batch,
            train_batch_size=a.train_batch,
            train_learning_rate=a.lr,
            train_gradient_accumulation_steps=a.samples_per_epoch // a.train_batch // a.updates_per_epoch,
            train_cfg=two,
            train_clip_range=a.clip_range,
            train_timestep_fraction=a.timestep_fraction,
            per_prompt_stat_tracking=a.advantages == "prompt",
            per_prompt_stat_tracking_buffer_size=a.buffer_size,
            per_prompt_stat_tracking_min_count=a.min_count,
        )
        pipeline = load_pipeline(a.model, a.rank, one_branch=not two)
        self.trainer = DDPOTrainer(config, jpeg_kilobytes, lambda: (draw.choice(prompts), {}), pipeline)
        pipeline.set_progress_bar_config(disable=True)
        self.epoch = self.updates = 0
        self.seconds: dict[str, float] = {}
        self.rewards: list[Any] = []
        self.logged: list[dict[str, Any]] = []
        self._clock("_generate_samples", "sampling")
        self._clock("compute_rewards", "rewards", self._keep_rewards)
        self._clock("_train_batched_samples", "training")
        log = self.trainer.accelerator.log

        def listen(values: dict[str, Any], **kwargs: Any) -> None:
            if "approx_kl" in values:
                self.logged.append(values)
            log(values, **kwargs)

        self.trainer.accelerator.log = listen
        names = "seed precision steps guidance lr rank timestep_fraction clip_range threads advantages".split()
        self.settings = {name: getattr(a, name) for name in names}
        self.settings |= {"sample_batch": a.sample_batch, "train_batch": a.train_batch, "branches": 2 if two else 1}
        if a.advantages == "prompt":
            self.settings |= {"buffer_size": a.buffer_size, "min_count": a.min_count}
        self.versions = {name: importlib.metadata.version(name) for name in PACKAGES}

    def _clock(self, method: str, phase: str, keep: Callable[[Any], Any] | None = None) -> None:
        inner = getattr(self.trainer, method)

        def timed(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            result = inner(*args, **kwargs)
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
            return keep(result) if keep else result

        setattr(self.trainer, method, timed)

    def _keep_rewards(self, result: Any) -> Any:
        rewards, metadata = result
        self.rewards = [float(value) for batch in rewards for value in batch]
        return rewards, metadata

    def run_epoch(self) -> dict[str, Any]:
        import numpy as np

        self.seconds, self.rewards, self.logged = {}, [], []
        start = time.perf_counter()
        self.updates = self.trainer.step(self.epoch, self.updates)
        self.seconds["total"] = time.perf_counter() - start
        line = {
            "epoch": self.epoch,
            "images": len(self.rewards),
            "seconds": {phase: round(value, 4) for phase, value in self.seconds.items()},
            "reward_mean": float(np.mean(self.rewards)),
            "reward_std": float(np.std(self.rewards)),
            "updates": len(self.logged),
            "approx_kl": [float(values["approx_kl"]) for values in self.logged],
            "clipfrac": [float(values["clipfrac"]) for values in self.logged],
            "settings": self.settings,
            "versions": self.versions,
        }
        self.epoch += 1
        return line


def orders(a: argparse.Namespace) -> Any:
    """One item for each epoch to run."""
    if not a.serve:
        yield from range(a.epochs)
        return
    for line in sys.stdin:
        word = line.strip()
        if word == "quit":
            return
        if word == "epoch":
            yield word
        elif word:
            print(f"not understood: {word!r} (epoch or quit)", file=sys.stderr)


def main(argv: list[str] | None = None) -> None:
    a = arguments(argv)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    answers: TextIO = sys.stdout
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(sys.stderr))  # stdout is for the JSON lines alone
        file = stack.enter_context(a.out.open("w", encoding="utf-8")) if a.out else None
        arm = Arm(a)
        print("ready", file=sys.stderr, flush=True)
        for _ in orders(a):
            text = json.dumps(arm.run_epoch())
            for stream in (answers, file):
                if stream:
                    print(text, file=stream, flush=True)


if __name__ == "__main__":
    main()
