"""From a resolved configuration to the parts that learn: policy, optimiser, algorithm."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from texforce_cli.algorithms.base import Algorithm, Progress
from texforce_cli.algorithms.ddpo import DDPO, DDPOSettings, Kept
from texforce_cli.algorithms.optimisation import Optimisation, OptimiserSettings
from texforce_cli.config import TrainConfig
from texforce_cli.core.ppo import mean_clip_range
from texforce_cli.core.train_steps import TrainSteps
from texforce_cli.diffusion.adapters import Adapter
from texforce_cli.diffusion.policy import Denoising, Policy
from texforce_cli.errors import UsageError
from texforce_cli.prompts import Prompt
from texforce_cli.rewards.isolation import WorkerSettings
from texforce_cli.rewards.registry import Registry
from texforce_cli.rewards.sharing import Address
from texforce_cli.rewards.terms import RewardSet, parse_hosts, parse_terms
from texforce_cli.team import Team
from texforce_cli.workflows.loras import load_lora


@dataclass(frozen=True)
class Scoring:
    """The rewards of a run, and those that are only watched, each by itself."""

    rewards: RewardSet
    watches: tuple[RewardSet, ...]

    def lend(self) -> list[Address | None]:
        """Where the workers of this process are lent to the others of this machine, for each of the sets."""
        return [one.lend() for one in (self.rewards, *self.watches)]

    @property
    def packages(self) -> dict[str, str]:
        """What all of them come from, with its version."""
        return {name: version for one in (self.rewards, *self.watches) for name, version in one.packages.items()}

    @property
    def made_from(self) -> dict[str, str]:
        """`packages`, and by `NAME files` a hash of what the options of a reward name."""
        return {name: version for one in (self.rewards, *self.watches) for name, version in one.made_from.items()}

    def close(self) -> None:
        """End every reward."""
        for one in (self.rewards, *self.watches):
            one.close()


def make_scoring(config: TrainConfig, registry: Registry, lent: Sequence[Address | None] = ()) -> Scoring:
    """Everything that scores in a run; `lent` is what another process of this machine lends."""
    rewards = make_rewards(config, registry, lent[0] if lent else None)
    watches: list[RewardSet] = []
    # what is only measured needs no score for every picture
    workers = WorkerSettings(config.reward_timeout, memory_gb=config.reward_memory, substitute=False)
    try:
        watched = parse_terms(config.watched_rewards, config.reward_option, beside=config.reward)
        for index, spec in enumerate(watched, 1):
            watches.append(RewardSet([spec], registry, workers=workers, lender=lent[index] if lent else None))
    except BaseException:
        Scoring(rewards, tuple(watches)).close()
        raise
    return Scoring(rewards, tuple(watches))


def make_rewards(config: TrainConfig, registry: Registry, lender: Address | None = None) -> RewardSet:
    """The rewards of the run, imported and made."""
    terms = parse_terms(config.reward, config.reward_option, beside=config.watched_rewards)
    workers = WorkerSettings(config.reward_timeout, workers=config.reward_workers, memory_gb=config.reward_memory)
    hosts = parse_hosts(config.reward_host, terms)
    return RewardSet(
        terms,
        registry,
        normalize=config.normalize_rewards,
        workers=workers,
        hosts=hosts,
        lender=lender,
        # on a CPU they would take it from each other, and Apple's GPU ends a process that uses it in two threads
        ahead=config.device.startswith("cuda"),
    )


def make_adapter(pipeline: Any, config: TrainConfig, *, begin: bool = True) -> Adapter:
    """A LoRA on the trained component; to `begin`, it takes over `--init-lora` where one is given."""
    rank = config.rank
    adapter = Adapter.insert(pipeline, config.train, rank=rank, alpha=config.alpha or rank, seed=config.seed)
    if config.init_lora and begin:
        loaded = load_lora(config.init_lora)
        adapter.import_(loaded.arrays, loaded.lora.source)
    return adapter


def make_policy(pipeline: Any, config: TrainConfig, adapter: Adapter) -> Policy:
    """The pipeline as the policy of Eq. (1), drawing as the configuration says.

    Raises:
        UsageError: none of its steps draws noise, so that there is nothing to learn from.
    """
    if config.gradient_checkpointing:
        pipeline.unet.enable_gradient_checkpointing()
    denoising = Denoising(config.steps, config.guidance, config.eta, config.size, config.negative_prompt)
    policy = Policy(pipeline, denoising, adapter=adapter, unconditional=config.uncond_embedding)
    if not policy.schedule.stochastic:
        raise UsageError(
            f"with --steps {config.steps} no denoising step of this model draws noise",
            f"use --steps {config.steps + 1}",
        )
    if config.compile:
        policy.compile()
    return policy


def make_optimisation(config: TrainConfig, policy: Policy, team: Team | None = None) -> Optimisation:
    """AdamW over the LoRA with the schedule of the whole run."""
    assert policy.adapter is not None
    settings = OptimiserSettings(
        learning_rate=config.lr,
        updates=config.total_epochs * config.updates_per_epoch,
        schedule=config.lr_schedule,
        warmup=config.warmup,
        weight_decay=config.weight_decay,
        max_grad_norm=config.grad_norm,
        ema=config.ema,
        loss_scale=_loss_scale(config, policy) if config.precision == "fp16" else 1.0,
    )
    return Optimisation(policy.adapter.parameters(), settings, team)


def _loss_scale(config: TrainConfig, policy: Policy) -> float:
    """A power of two with which the loss has gradients of some hundredths at the U-Net's output, where fp16 has room on both sides.

    The loss is a mean over an update's images and steps, and each log-probability one over the elements of a latent: their
    product divides the gradient, by 10^8 with the paper's settings.
    """
    steps = TrainSteps.parse(config.train_steps).count(len(policy.schedule.stochastic))
    images = min(config.update_batch, config.samples_per_epoch)
    elements = images * steps * math.prod(policy.latent_shape)
    return float(2 ** max(0, round(math.log2(elements / 64))))


def make_algorithm(
    config: TrainConfig,
    policy: Policy,
    rewards: RewardSet,
    optimisation: Optimisation,
    prompts: Sequence[Prompt],
    progress: Progress,
    team: Team | None = None,
    kept: Kept | None = None,
) -> Algorithm:
    """What learns. DDPO is the one there is; others that follow `algorithms.base.Algorithm` are chosen here."""
    settings = DDPOSettings(
        samples=config.samples_per_epoch,
        group_size=config.group_size,
        micro_batch=config.micro_batch,
        update_batch=config.update_batch,
        clip_range=mean_clip_range(config.clip_range, config.clip_convention, int(np.prod(policy.latent_shape))),
        train_steps=TrainSteps.parse(config.train_steps),
        advantages=config.advantages,
        advantage_clip=config.adv_clip,
        inner_epochs=config.inner_epochs,
        kl_weight=config.kl,
        kl_target=config.kl_target,
        fit_micro_batch=config.fit_micro_batch,
        timestep_batch=config.timestep_batch,
    )
    return DDPO(
        policy, rewards, optimisation, prompts, settings, seed=config.seed, progress=progress, team=team, kept=kept
    )
