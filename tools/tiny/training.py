"""One training loop for every network of the embedded world: fixed steps, seeded by step, checkpointed, resumable.

A step's random numbers come from (stage, seed, step) alone, so that a run which was interrupted continues to the same
bits as one that was not, on the same machine with the same number of threads.
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from texforce_cli.core.seeds import derive
from texforce_cli.devices import cpu_computes_bf16
from texforce_cli.files import atomic_path
from tools.tiny.muon import Muon


@dataclass(frozen=True)
class Recipe:
    """What one network is trained with: AdamW (and Muon for the matrices within it, where `muon` is their rate), a
    warm-up, then a constant rate up to `hold` of the steps, then a cosine down to a fiftieth; the result is the
    exponential moving average of the weights."""

    name: str
    steps: int
    learning_rate: float
    hold: float = 0.0
    warmup: int = 200
    weight_decay: float = 0.01
    beta2: float = 0.99
    ema: float = 0.999
    seed: int = 0
    muon: float = 0.0

    def share(self, step: int) -> float:
        """Share of the learning rate at `step` (from 0)."""
        done = step / self.steps
        cosine = 0.5 * (1 + math.cos(math.pi * max(0.0, done - self.hold) / (1 - self.hold)))
        return min(1.0, (step + 1) / self.warmup) * max(0.02, cosine)


def device() -> torch.device:
    """The GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def autocast() -> torch.autocast:
    """bfloat16 where the hardware computes in it; elsewhere it is emulated, twenty times slower than fp32."""
    return torch.autocast(device().type, torch.bfloat16, enabled=device().type == "cuda" or cpu_computes_bf16())


def train(
    recipe: Recipe,
    modules: dict[str, torch.nn.Module],
    parts: Sequence[Callable[[torch.Generator], torch.Tensor]],
    folder: Path,
    *,
    validate: Callable[[], float] | None = None,
    checkpoint_seconds: float = 120,
    validations: int = 20,
) -> None:
    """Minimise the mean of the `parts` of a step's loss over the parameters of `modules`, which hold the averaged weights
    afterwards. Each part is computed in a thread of its own and given a generator in the same state; two threads with
    half a batch each take two thirds of the time of one batch on two threads.

    `folder` gets `NAME.checkpoint.safetensors` (every two minutes and on Ctrl-C) and `NAME.losses.jsonl`, a line a hundred
    steps; a finished checkpoint is only loaded. `validate()` is called with the averaged weights in place.
    """
    named = {f"{key}.{name}": p for key, module in modules.items() for name, p in module.named_parameters()}
    names, parameters = list(named), list(named.values())
    optimizers = _optimizers(recipe, named)
    rates = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]
    average = [p.detach().clone() for p in parameters]
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{recipe.name}.checkpoint.safetensors"
    state = _State(names, parameters, average, optimizers)
    step, seconds = _load(checkpoint, recipe, state)
    log = folder / f"{recipe.name}.losses.jsonl"
    started = saved = time.monotonic()
    losses: list[torch.Tensor] = []
    halfway = False  # within a step's update, when weights, moments and average do not belong together

    def save() -> None:
        _save(checkpoint, recipe, state, step, seconds + time.monotonic() - started)

    def gradients(
        part: Callable[[torch.Generator], torch.Tensor],
    ) -> tuple[torch.Tensor, Sequence[torch.Tensor | None]]:
        loss = part(torch.Generator().manual_seed(derive(recipe.seed, recipe.name, step)))
        return loss.detach(), torch.autograd.grad(loss, parameters, allow_unused=True)

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(len(parts), initializer=torch.set_num_threads, initargs=(max(1, threads // len(parts)),))
    try:
        while step < recipe.steps:
            for optimizer, full in zip(optimizers, rates, strict=True):
                for group, rate in zip(optimizer.param_groups, full, strict=True):
                    group["lr"] = rate * recipe.share(step)
            computed = list(pool.map(gradients, parts))
            for parameter, *of_parts in zip(parameters, *(found for _, found in computed), strict=True):
                given = [gradient for gradient in of_parts if gradient is not None]
                # in the parameter's memory layout, which the fused optimizer takes for granted
                parameter.grad = sum(given, torch.zeros_like(parameter)).div_(len(parts)) if given else None
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            halfway = True
            list(pool.map(lambda optimizer: optimizer.step(), optimizers))
            step += 1
            with torch.no_grad():
                torch._foreach_lerp_(average, parameters, 1 - min(recipe.ema, (1 + step) / (10 + step)))
            halfway = False
            losses.append(torch.stack([loss for loss, _ in computed]).mean())
            if step % 100 == 0 or step == recipe.steps:
                line: dict[str, float] = {"step": step, "loss": round(float(torch.stack(losses).mean()), 5)}
                losses.clear()
                if validate and (
                    step % max(100, recipe.steps // validations // 100 * 100) == 0 or step == recipe.steps
                ):
                    line["validation"] = round(_averaged(parameters, average, validate), 5)
                line["seconds"] = round(seconds + time.monotonic() - started, 1)
                with log.open("a", encoding="utf-8") as file:
                    file.write(json.dumps(line) + "\n")
                print(recipe.name, line, flush=True)
            if time.monotonic() - saved > checkpoint_seconds:
                save()
                saved = time.monotonic()
    finally:
        pool.shutdown(cancel_futures=True)
        if not halfway:
            save()
    with torch.no_grad():
        for parameter, mean in zip(parameters, average, strict=True):
            parameter.copy_(mean)
    for module in modules.values():
        module.eval()


_ENDS = ("embedding", "conv_in", "conv_out")  # the layers that touch tokens, times and latents


def _optimizers(recipe: Recipe, named: dict[str, torch.nn.Parameter]) -> list[torch.optim.Optimizer]:
    inner = [p for name, p in named.items() if recipe.muon and p.ndim > 1 and not any(end in name for end in _ENDS)]
    rest = [p for p in named.values() if not any(p is other for other in inner)]
    groups = [
        {"params": [p for p in rest if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in rest if p.ndim <= 1], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, recipe.beta2), fused=True)
    halves = inner[::2], inner[1::2]  # so that two threads can share them
    return [adam, *(Muon(half, recipe.muon, recipe.weight_decay) for half in halves if half)]


@dataclass(frozen=True)
class _State:
    """The tensors of a training that a checkpoint holds, in the order of `names`."""

    names: list[str]
    parameters: list[torch.nn.Parameter]
    average: list[torch.Tensor]
    optimizers: list[torch.optim.Optimizer]

    def of(self, parameter: torch.nn.Parameter) -> dict[str, Any]:
        """The optimizer's state of `parameter`, to be read and filled."""
        owner = next(o for o in self.optimizers if any(p is parameter for g in o.param_groups for p in g["params"]))
        found: dict[str, Any] = owner.state[parameter]
        return found


_MOMENTS = ("exp_avg", "exp_avg_sq", "momentum")


def _averaged(parameters: list[torch.nn.Parameter], average: list[torch.Tensor], measure: Callable[[], float]) -> float:
    raw = [p.detach().clone() for p in parameters]
    with torch.no_grad():
        torch._foreach_copy_(parameters, average)
        try:
            return measure()
        finally:
            torch._foreach_copy_(parameters, raw)


def _save(
    path: Path,
    recipe: Recipe,
    state: _State,
    step: int,
    seconds: float,
) -> None:
    tensors = {}
    for name, parameter, mean in zip(state.names, state.parameters, state.average, strict=True):
        tensors[f"raw.{name}"], tensors[f"mean.{name}"] = parameter.detach(), mean
        moments = state.of(parameter)
        tensors |= {f"{key}.{name}": moments[key] for key in _MOMENTS if key in moments}
    header = {"recipe": repr(recipe), "step": str(step), "seconds": str(seconds)}
    with atomic_path(path) as temporary:
        save_file({key: tensor.cpu().contiguous() for key, tensor in tensors.items()}, temporary, header)


def _load(
    path: Path,
    recipe: Recipe,
    state: _State,
) -> tuple[int, float]:
    if not path.exists():
        return 0, 0.0
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        header = file.metadata()
    if header["recipe"] != repr(recipe):
        raise SystemExit(f"{os.fspath(path)} was made by another recipe ({header['recipe']}); delete it to train anew")
    tensors = load_file(path)
    step = int(header["step"])
    with torch.no_grad():
        for name, parameter, mean in zip(state.names, state.parameters, state.average, strict=True):
            parameter.copy_(tensors[f"raw.{name}"])
            mean.copy_(tensors[f"mean.{name}"])
            moments = state.of(parameter)
            for key in _MOMENTS:
                if f"{key}.{name}" in tensors:
                    moments["step"] = torch.tensor(float(step), device=parameter.device)
                    # in the parameter's memory layout, which the fused optimizer takes for granted
                    moments[key] = torch.empty_like(parameter).copy_(tensors[f"{key}.{name}"])
    return step, float(header["seconds"])
