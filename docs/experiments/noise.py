"""Which noise decides a reward: pictures of one prompt that begin with the same noise x_T and draw other noise in some steps only.

    python docs/experiments/noise.py [STEPS]

For each prompt some beginnings, and for each of them some pictures, the steps named draw noise (eta 1), all others are deterministic.
The share is the variance of the reward among the pictures of one beginning, over that among all pictures of the prompt: what a
policy that is trained at these steps, with beginnings of its own for every image, can learn from. The rest is the beginning's.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from texforce_cli.core.seeds import derive
from texforce_cli.diffusion.models import load_pipeline
from texforce_cli.diffusion.policy import Denoising, Policy
from texforce_cli.workflows.assembly import make_rewards
from texforce_cli.workflows.plan import plan

REWARDS = (("jpeg-incompressibility", "animals"), ("tiny-clip", "color"), ("tiny-clip", "composition"))
PROMPTS, BEGINNINGS, PICTURES = 8, 6, 6


def windows(steps: int) -> list[tuple[int, ...]]:
    """All steps; the first ones; two and three that begin later."""
    later = [(1, 2), (2, 3), (2, 3, 4), (4, 5)]
    return [tuple(range(steps)), (0,), (0, 1), (0, 1, 2), *(one for one in later if one[-1] < steps)]


@torch.no_grad()
def pictures(policy: Policy, prompt: str, number: int) -> Any:
    """uint8 [BEGINNINGS * PICTURES, height, width, 3] in the policy's schedule; equal beginnings are neighbours."""
    n = BEGINNINGS * PICTURES
    generators = [torch.Generator().manual_seed(derive(number, "picture", i)) for i in range(n)]
    starts = [torch.Generator().manual_seed(derive(number, "beginning", i // PICTURES)) for i in range(n)]

    def noise(of: Sequence[torch.Generator]) -> torch.Tensor:
        return torch.stack([torch.randn(policy.latent_shape, generator=one) for one in of])

    latents, embeddings, schedule = noise(starts), policy.embed([prompt] * n), policy.schedule
    for index in range(len(schedule)):
        output, _ = policy.output(latents, index, embeddings)
        latents = schedule.mean(latents, output, index)
        if index in schedule.stochastic:
            latents = latents + schedule.sigma[index] * noise(generators)
    return policy.decode(latents).numpy()


def shares(reward: str, prompts: str, steps: int) -> list[tuple[float, float]]:
    """For each window, the share of the variance within a beginning, and the standard deviation among all pictures."""
    made = plan({"model": "tiny", "device": "cpu", "reward": [reward], "prompts": prompts})
    pipeline = load_pipeline(made.source, device=torch.device("cpu"), precision="fp32")
    policy, rewards = Policy(pipeline, Denoising(steps)), make_rewards(made.config, made.registry)
    found = []
    for window in windows(steps):
        within, among = [], []
        with policy.noise_at(window):
            for number, prompt in enumerate(made.prompts.seen[:PROMPTS]):
                texts = [prompt.text] * (BEGINNINGS * PICTURES)
                scored = rewards.score(pictures(policy, prompt.text, number), texts, [prompt.metadata] * len(texts))
                values = rewards.weighted(scored).reshape(BEGINNINGS, PICTURES)
                within.append(values.var(axis=1, ddof=1).mean())
                among.append(values.var(ddof=1))
        found.append((float(np.mean(within) / np.mean(among)), float(np.mean(among)) ** 0.5))
    return found


def main(steps: int = 10) -> None:
    """A Markdown table on stdout."""
    columns = [shares(reward, prompts, steps) for reward, prompts in REWARDS]
    print(f"| noise in, of {steps} steps | " + " | ".join(f"{reward}, {prompts}" for reward, prompts in REWARDS) + " |")
    print("|---" * (1 + len(REWARDS)) + "|")
    for window, *cells in zip(windows(steps), *columns, strict=True):
        label = "all" if len(window) == steps else ", ".join(str(i + 1) for i in window)
        print(f"| {label} | " + " | ".join(f"{share:.2f} ({deviation:.2g})" for share, deviation in cells) + " |")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
