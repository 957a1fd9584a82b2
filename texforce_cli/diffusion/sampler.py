"""Drawing pictures with the policy while keeping what training needs: states and log-probabilities."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from texforce_cli.devices import full_memory
from texforce_cli.diffusion.policy import Policy


@dataclass(frozen=True)
class Trajectory:
    """N images with the T steps that led to them.

    `latents` [T+1, N, C, H, W], x_T first, each stored once; `log_probs` [T, N] in fp32 of the stored latents, NaN where
    a step is deterministic; `unconditional` [T, N, C, H, W] outputs when the policy can reuse them, else None; `images`
    uint8 [N, height, width, 3], none where batches were joined: nothing is learnt from pixels.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    latents: Tensor
    log_probs: Tensor
    unconditional: Tensor | None
    images: NDArray[np.uint8]

    @classmethod
    def join(cls, parts: Sequence[Trajectory]) -> Trajectory:
        """Several batches as one to learn from."""
        kept = [part.unconditional for part in parts if part.unconditional is not None]
        return cls(
            prompts=tuple(prompt for part in parts for prompt in part.prompts),
            seeds=tuple(seed for part in parts for seed in part.seeds),
            latents=torch.cat([part.latents for part in parts], dim=1),
            log_probs=torch.cat([part.log_probs for part in parts], dim=1),
            unconditional=torch.cat(kept, dim=1) if kept else None,
            images=np.empty((0, *parts[0].images.shape[1:]), np.uint8),
        )


@torch.no_grad()
@full_memory()
def rollout(
    policy: Policy, prompts: Sequence[str], seeds: Sequence[int], *, latent_dtype: torch.dtype = torch.float32
) -> Trajectory:
    """Draw one image for each (prompt, seed) as one batch, keeping its trajectory.

    An image's noise comes from its seed alone, drawn on the CPU: the batch and the device do not change it.

    Raises:
        Unsuited: as `Policy.decode`.
        torch.OutOfMemoryError: the memory is full, whatever a library calls it.
    """
    schedule, device, n = policy.schedule, policy.device, len(prompts)
    noise = _noise(seeds, policy.latent_shape, device)
    embeddings = policy.embed(prompts)
    latents = torch.empty((len(schedule) + 1, n, *policy.latent_shape), dtype=latent_dtype, device=device)
    log_probs = torch.full((len(schedule), n), torch.nan, device=device)
    outputs = []
    latents[0] = next(noise)
    stochastic = set(schedule.stochastic)
    for index in range(len(schedule)):
        output, unconditional = policy.output(latents[index], index, embeddings)
        mean = schedule.mean(latents[index], output, index)
        if index in stochastic:
            latents[index + 1] = mean + schedule.sigma[index] * next(noise)
            # of the stored state: rounding it afterwards would be an error of many clip ranges
            log_probs[index] = schedule.log_prob(latents[index + 1], mean, index)
        else:
            latents[index + 1] = mean
        if policy.reuses_unconditional and unconditional is not None:
            outputs.append(unconditional)
    images = policy.decode(latents[-1]).numpy()
    kept = torch.stack(outputs) if outputs else None
    return Trajectory(tuple(prompts), tuple(seeds), latents, log_probs, kept, images)


@torch.no_grad()
def draw(policy: Policy, prompts: Sequence[str], seeds: Sequence[int], *, batch: int) -> NDArray[np.uint8]:
    """Images only: uint8 [N, height, width, 3] for each (prompt, seed), `batch` at a time."""
    images = []
    for start in range(0, len(prompts), batch):
        images.append(rollout(policy, prompts[start : start + batch], seeds[start : start + batch]).images)
    return np.concatenate(images)


def too_full(device: torch.device, images: int, left: int) -> str:
    """What is said where the memory had no room for `images` at once, and `left` are tried."""
    return (
        f"the memory of {device} was too full for {images} images at once: it goes on with {left}, and the result "
        "differs by rounding only"
    )


def _noise(seeds: Sequence[int], shape: tuple[int, ...], device: torch.device) -> Iterator[Tensor]:
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    while True:
        yield torch.stack([torch.randn(shape, generator=generator) for generator in generators]).to(device)
