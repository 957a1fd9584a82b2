"""DDPO: PPO over denoising steps (Black et al. 2024), as TexForce uses it on the text encoder (Eq. 3-5).

Deviations from the paper, each by option: group-relative advantages, which steps are trained, the unconditional branch
from sampling, a KL term to the base, a learning rate steered by approx_kl.
"""

from __future__ import annotations

import functools
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from texforce_cli.algorithms.base import EpochReport, Phase, Preflight, Progress
from texforce_cli.algorithms.optimisation import Optimisation
from texforce_cli.core import advantages as adv
from texforce_cli.core.ppo import Diagnostics, clipped_surrogate, reference_kl, steered_learning_rate
from texforce_cli.core.seeds import derive
from texforce_cli.core.train_steps import TrainSteps
from texforce_cli.devices import full_memory, if_room, release
from texforce_cli.diffusion.policy import Embeddings, Policy
from texforce_cli.diffusion.sampler import Trajectory, rollout, too_full
from texforce_cli.prompts import Prompt
from texforce_cli.rewards.terms import RewardSet, Scores
from texforce_cli.team import Team

R = TypeVar("R")


@dataclass(frozen=True)
class DDPOSettings:
    """An epoch draws `samples` images, `group_size` a prompt, and makes one update every `update_batch` of them."""

    samples: int
    group_size: int
    micro_batch: int
    update_batch: int
    clip_range: float
    """On the mean log-ratio over elements."""
    train_steps: TrainSteps
    advantages: adv.Advantages = "group"
    advantage_clip: float = 5.0
    inner_epochs: int = 1
    kl_weight: float = 0.0
    kl_target: float | None = None
    fit_micro_batch: bool = False
    """Double the micro-batch before the first epoch as often as a pass fits into the memory."""
    timestep_batch: int = 1
    """Steps of an image that one pass of training takes together; 0: as many as fit into the memory then."""


@dataclass(frozen=True)
class Rollouts:
    """An epoch's images with their rewards. Where several processes share the work, `trajectory` has the images of this
    one alone, each at its `places` [N] (-1: another's); the rest is of all images.
    """

    trajectory: Trajectory
    places: Tensor
    prompts: tuple[str, ...]
    scores: Scores
    counts: Mapping[str, int]
    warnings: tuple[str, ...]


class Kept:
    """Where the batches of an epoch under way outlive an interruption: here, nowhere."""

    def found(self, epoch: int, prompts: Mapping[int, str], device: torch.device) -> Iterator[Trajectory]:
        """Those of the images of an epoch that begins, `prompts` by their seeds, that are there, each once."""
        return iter(())

    def keep(self, epoch: int, first: int, drawn: Trajectory) -> None:
        """A batch that was drawn, whose first image is number `first` of the epoch."""

    def all_drawn(self) -> None:
        """What this process draws of the epoch is."""

    def save(self) -> None:
        """The epoch is broken off."""

    def warnings(self) -> list[str]:
        """What there is to say since the last call."""
        return []


@dataclass(frozen=True)
class Update:
    """What one optimiser step saw, in all processes."""

    diagnostics: Diagnostics
    grad_norm: float
    reference_kl: float


class DDPO:
    """Sample, score, compare, update: `run_epoch`."""

    def __init__(
        self,
        policy: Policy,
        rewards: RewardSet,
        optimisation: Optimisation,
        prompts: Sequence[Prompt],
        settings: DDPOSettings,
        *,
        seed: int,
        progress: Progress,
        team: Team | None = None,
        kept: Kept | None = None,
    ) -> None:
        self.team = team or Team()
        self._kept = kept or Kept()
        self.policy, self.rewards, self.optimisation = policy, rewards, optimisation
        self.prompts, self.settings, self.seed, self.progress = list(prompts), settings, seed, progress
        self.tracker = adv.PromptTracker()
        self.micro_batch = settings.micro_batch
        """Images in one pass: halved where the memory was full."""
        self.timestep_batch = settings.timestep_batch or 1
        """Steps of each of them in one pass of training: halved first."""
        self._fit, self._fold = settings.fit_micro_batch, not settings.timestep_batch
        self._halved: list[str] = []
        self._seconds: dict[Phase, float] = {}

    def preflight(self) -> Preflight:
        """Draw two micro-batches and take their log-probabilities again as training will: mixed, with gradients.

        Of several processes the worst result counts, and the pass that all have room for.
        """
        with full_memory():
            room = self._room_of_an_epoch()
        if self._fit or self._fold:
            self._fit_pass()
        found = self._measured()
        if (
            self._fold and not found.ratio_ok and any(self.team.each(self.timestep_batch > 1))
        ):  # 16 bits may round another shape otherwise
            self.timestep_batch = 1
            found = self._measured()
        self._fit = self._fold = False
        del room
        self._empty()
        return found

    def _room_of_an_epoch(self) -> list[Tensor]:
        """As much memory as an epoch's trajectories take: what fits beside it fits when they are there.

        Raises:
            torch.OutOfMemoryError: there is no room for them, which would be found out when all of them are drawn.
        """
        images, steps = len(self._share(0)), len(self.policy.schedule)
        states = [steps + 1, *([steps] if self.policy.reuses_unconditional else [])]
        # both at once, as when batches are joined
        whole, _ = ([self._latents(n, images) for n in states] for _ in range(2))
        return whole

    def _latents(self, states: int, images: int) -> Tensor:
        return torch.empty((states, images, *self.policy.latent_shape), device=self.policy.device)

    def _measured(self) -> Preflight:
        found = None
        while found is None:  # after fitting: what is measured has the shape that trains
            found = self._tried(self._preflight, self.micro_batch, self.timestep_batch)
        return Preflight.worst(self.team.each(found))

    def _fit_pass(self) -> None:
        """Double the micro-batch while the gradients of one pass fit, up to this process's share of an update; then the
        steps in it, up to those that an image is trained on.
        """
        drawn = self._draw(-1, range(1), [self._prompts_of(epoch=-1)[0].text])
        share = -(-self.settings.update_batch // self.team.size)
        steps = self.settings.train_steps.count(len(self.policy.schedule.stochastic))
        room = True
        while room and self._fit and 2 * self.micro_batch <= share:
            room = self._grows(drawn, 2 * self.micro_batch, self.timestep_batch)
        while room and self._fold and 2 * self.timestep_batch <= steps:
            room = self._grows(drawn, self.micro_batch, 2 * self.timestep_batch)
        self.micro_batch, self.timestep_batch = map(min, zip(*self.team.each((self.micro_batch, self.timestep_batch))))

    def _grows(self, drawn: Trajectory, images: int, steps: int) -> bool:
        """Whether there is room for a pass with the gradients of so many images at so many steps; it then has them."""
        before = self.micro_batch, self.timestep_batch
        self.micro_batch, self.timestep_batch = images, steps
        where = torch.zeros(images, dtype=torch.int64, device=self.policy.device)
        step = torch.full((steps, images), self.policy.schedule.stochastic[0], device=self.policy.device)
        advantages = torch.zeros(images, device=where.device)
        room = if_room(lambda: list(self._accumulate(drawn, where, step, advantages, 1.0))) is not None
        self._empty()
        if not room:
            self.micro_batch, self.timestep_batch = before
        return room

    def _empty(self) -> None:
        """Free what passes have filled, for other processes too."""
        self.optimisation.forget()
        release()

    def _preflight(self) -> Preflight:
        size = self.micro_batch
        prompts = [prompt.text for prompt in self._prompts_of(epoch=-1)[: 2 * size]]
        batches = [range(i, min(i + size, len(prompts))) for i in range(0, len(prompts), size)]
        schedule, errors = self.policy.schedule, dict.fromkeys(self.policy.schedule.stochastic, 0.0)
        parts, done, total = [], 0, 2 * len(prompts) * len(errors)
        for batch in batches:
            parts.append(self._draw(-1, batch, [prompts[i] for i in batch]))
            done += len(batch) * len(errors)
            self.progress("preflight", done, total)
        drawn = Trajectory.join(parts)
        order = torch.from_numpy(self._rng("order", -1).permutation(len(prompts))).to(self.policy.device)
        for images in order.split(size):
            embeddings = self.policy.embed([prompts[i] for i in images.tolist()])
            for several in torch.tensor(schedule.stochastic, device=images.device).split(self.timestep_batch):
                steps, places = several.repeat_interleave(len(images)), images.repeat(len(several))
                error = self._ratio_error(drawn, places, steps, embeddings.leaf().repeat(len(several)))
                for index, worst in zip(several.tolist(), error.view(len(several), -1).amax(dim=1).tolist()):
                    errors[index] = max(errors[index], worst) if math.isfinite(worst) else math.inf
                done += len(places)
                self.progress("preflight", done, total)
        shares = dict(zip(schedule.stochastic, self.settings.train_steps.shares(len(schedule.stochastic))))
        return Preflight(
            ratio_error=max((errors[index] for index, share in shares.items() if share), default=0.0),
            limit=self.ratio_limit,
            steps=tuple(
                {
                    "timestep": schedule.timesteps[i],
                    "sigma": schedule.sigma[i],
                    "sensitivity": schedule.sensitivity(i),
                    "ratio_error": errors.get(i, 0.0),
                    "trained": shares.get(i, 0.0),
                }
                for i in range(len(schedule))
            ),
            micro_batch=size,
            timestep_batch=self.timestep_batch,
            gradient_error=self._gradient_error(drawn, order[:size]) if self.policy.compiled else None,
        )

    def _ratio_error(self, drawn: Trajectory, images: Tensor, steps: Tensor, embeddings: Embeddings) -> Tensor:
        """|ratio - 1| [n] with unchanged weights. What the gradients would need is free again when this returns."""
        log_prob, _ = self._log_prob(drawn, images, steps, embeddings)
        return torch.expm1(log_prob.detach() - drawn.log_probs[steps, images]).abs()

    def _gradient_error(self, drawn: Trajectory, images: Tensor) -> float:
        """How far the compiled network's gradient is from that of the same network uncompiled: |g - g'| / |g|."""
        with torch.compiler.set_stance("force_eager"):
            expected = self._gradient(drawn, images)
        error = (self._gradient(drawn, images) - expected).norm() / expected.norm()
        return error.item() if torch.isfinite(error) else math.inf

    def _gradient(self, drawn: Trajectory, images: Tensor) -> Tensor:
        """The gradients [P] of all trained numbers, of one pass at the first trained step, in which every other image is bad."""
        step = torch.full_like(images, self.policy.schedule.stochastic[0])
        signs = 1.0 - 2.0 * (torch.arange(len(images), device=images.device) % 2)
        self.optimisation.forget()
        # as small as in an update, for which the scale of fp16's loss is made
        count = self.settings.update_batch * self.settings.train_steps.count(len(self.policy.schedule.stochastic))
        for _ in self._accumulate(drawn, images, step[None], signs, 1 / count):
            pass
        found = [parameter.grad for parameter in self.optimisation.parameters if parameter.grad is not None]
        gradient = torch.cat([one.flatten().float() for one in found])
        self.optimisation.forget()
        return gradient

    @property
    def ratio_limit(self) -> float:
        """How far the ratio may be from 1 with unchanged weights: a tenth of the clip range."""
        return 0.1 * self.settings.clip_range

    def run_epoch(self, epoch: int) -> EpochReport:
        """Draw and score images with the policy as it is, then learn from them."""
        with self.policy.noise_at(self.settings.train_steps.window(self.policy.schedule.stochastic)):
            return self._run_epoch(epoch)

    def _run_epoch(self, epoch: int) -> EpochReport:
        self._seconds = {"sampling": 0.0, "rewards": 0.0, "training": 0.0}
        self.policy.snapshot_unconditional()
        rollouts = self._collect(epoch)
        rewards, prompts = rollouts.scores.total, rollouts.prompts
        raw = self.rewards.weighted(rollouts.scores.terms)
        advantages = self._advantages(rewards, prompts)
        flat = not adv.varies(rewards) or bool(advantages.abs().max() < adv.EPSILON)
        learning_rate = self.optimisation.learning_rate
        with self._timed("training"):
            updates = [] if flat else list(self._learn(epoch, rollouts, advantages))
            self._empty()
        said = dict.fromkeys(
            text for texts in self.team.each([*self._halved, *self._kept.warnings()]) for text in texts
        )
        self._halved = []
        skipped = sum(not math.isfinite(update.grad_norm) for update in updates)
        updates = [update for update in updates if math.isfinite(update.grad_norm)]
        diagnostics = [update.diagnostics for update in updates]
        report = EpochReport(
            epoch=epoch,
            images=len(rewards),
            reward_mean=float(raw.mean()),
            reward_std=float(raw.std()),
            terms={
                name: {"mean": float(values.mean()), "std": float(values.std())}
                for name, values in rollouts.scores.terms.items()
            },
            approx_kl=diagnostics[-1].approx_kl if diagnostics else 0.0,
            clip_fraction=float(np.mean([d.clip_fraction for d in diagnostics])) if diagnostics else 0.0,
            ratio_error=diagnostics[0].ratio_error if diagnostics else 0.0,
            grad_norm=float(np.mean([update.grad_norm for update in updates])) if updates else 0.0,
            learning_rate=learning_rate,
            seconds=dict(self._seconds),
            reference_kl=float(np.mean([u.reference_kl for u in updates]))
            if updates and self.settings.kl_weight
            else None,
            flat=flat,
            skipped_updates=skipped,
            counts=rollouts.counts,
            warnings=(*rollouts.warnings, *self._warnings(flat, skipped, prompts, diagnostics, said)),
        )
        if self.settings.kl_target and updates and not skipped:  # fewer updates go less far, whatever the rate
            self.optimisation.base_rate = steered_learning_rate(
                self.optimisation.base_rate, report.approx_kl, self.settings.kl_target
            )
        return report

    def state_dict(self) -> dict[str, Any]:
        """The tracker of the prompts, and the pass that there is room for, or that it is still to be fitted."""
        fitted = {"micro_batch": self.micro_batch, "fit": self._fit}
        folded = {"timestep_batch": self.timestep_batch, "fold": self._fold}
        return {"tracker": self.tracker.state_dict(), **fitted, **folded}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        self.tracker.load_state_dict(state["tracker"])
        self.micro_batch, self._fit = state.get("micro_batch", self.micro_batch), state.get("fit", False)
        self.timestep_batch, self._fold = state.get("timestep_batch", self.timestep_batch), state.get("fold", False)

    # sampling

    def _collect(self, epoch: int) -> Rollouts:
        chosen = self._prompts_of(epoch)
        batches, share, total = self._batches(epoch, chosen), len(self._share(epoch)), len(chosen)
        mine: list[int] = []
        parts: list[Trajectory] = []
        terms: defaultdict[str, list[NDArray[np.float64]]] = defaultdict(list)
        pending: deque[Future[dict[str, NDArray[np.float64]]]] = deque()

        def tell(reward: float | None = None) -> None:
            scored = sum(map(len, next(iter(terms.values()), [])))
            self.progress("rewards", self._of_all(scored, total), total, reward=reward)

        def collect() -> None:
            with self._timed("rewards"):
                scored = self.rewards.awaited(pending.popleft(), tell, self.team.get_on)
                for name, values in scored.items():
                    terms[name].append(values)
            so_far = self.rewards.weighted({name: np.concatenate(values) for name, values in terms.items()})
            known = so_far[np.isfinite(so_far)]
            tell(float(known.mean()) if known.size else None)

        while len(mine) < share:
            with self._timed("sampling"):
                images, drawn = next(batches)
            mine += images
            parts.append(drawn)
            self.progress("sampling", self._of_all(len(mine), total), total)
            with self._timed("rewards"):
                pending.append(self._score(drawn, [chosen[i] for i in images]))
            while pending and pending[0].done():
                collect()
        self._kept.all_drawn()
        while pending:  # rewards in processes of their own score while the next images are drawn
            collect()
        places = torch.full((total,), -1)
        places[torch.tensor(mine)] = torch.arange(len(mine))
        scored = {name: np.concatenate(values) for name, values in terms.items()}
        return Rollouts(
            Trajectory.join(parts),
            places.to(self.policy.device),
            tuple(prompt.text for prompt in chosen),
            *self._of_team(mine, scored),
        )

    def _share(self, epoch: int) -> Sequence[int]:
        """The images that this process draws: an equal part of those of each update, in ascending order."""
        images, size = self.settings.samples, self.settings.update_batch
        if self.team.size == 1:
            return range(images)
        order = self._order(epoch, 0).tolist()
        updates = [order[start : start + size] for start in range(0, images, size)]
        return sorted(i for update in updates for i in update[self.team.rank :: self.team.size])

    def _of_all(self, done: int, total: int) -> int:
        """How many images are done by all processes when this one has done `done`."""
        return min(total, done * self.team.size)

    def _of_team(
        self, mine: Sequence[int], scored: Mapping[str, NDArray[np.float64]]
    ) -> tuple[Scores, Mapping[str, int], tuple[str, ...]]:
        """The scores of all images, what the rewards counted and what they have to say, of all processes."""
        with self._timed("rewards"):
            self.team.each(None)  # all have scored, so the owner of lent workers has counted everything
        terms = {spec.name: np.empty(self.settings.samples) for spec in self.rewards.specs}
        counts: Counter[str] = Counter()
        warnings: list[str] = []
        for indices, values, counted, said in self.team.each(
            (list(mine), dict(scored), self.rewards.counts(), self.rewards.warnings())
        ):
            for name, theirs in values.items():
                terms[name][indices] = theirs
            counts.update(counted)
            warnings += said
        return self.rewards.total(terms), dict(counts), tuple(dict.fromkeys(warnings))

    def _batches(self, epoch: int, prompts: Sequence[Prompt]) -> Iterator[tuple[list[int], Trajectory]]:
        """The images of this process, some at a time: what an interrupted run has left of them, then the others, drawn."""
        share = self._share(epoch)
        left = dict(zip(self._seeds(epoch, share), share))
        wanted = {seed: prompts[image].text for seed, image in left.items()}
        for drawn in self._kept.found(epoch, wanted, self.policy.device):
            yield [left.pop(seed) for seed in drawn.seeds], drawn
        images = list(left.values())
        while images:
            drawn = self._draw_first(epoch, images, prompts)
            self._kept.keep(epoch, images[0], drawn)
            count = len(drawn.seeds)
            yield images[:count], drawn
            images = images[count:]

    def _seeds(self, epoch: int, images: Sequence[int]) -> list[int]:
        return [derive(self.seed, "image", epoch, index) for index in images]

    def _draw_first(self, epoch: int, images: Sequence[int], prompts: Sequence[Prompt]) -> Trajectory:
        """A micro-batch of `images`, as many of the first as there is room for."""
        drawn = None
        while drawn is None:
            indices = images[: self.micro_batch]
            texts = [prompts[i].text for i in indices]
            drawn = self._tried(functools.partial(self._draw, epoch, indices, texts), len(indices))
        return drawn

    def _draw(self, epoch: int, indices: Sequence[int], prompts: Sequence[str]) -> Trajectory:
        drawn: Trajectory = rollout(self.policy, prompts, self._seeds(epoch, indices))
        return drawn

    def _score(self, drawn: Trajectory, batch: Sequence[Prompt]) -> Future[dict[str, NDArray[np.float64]]]:
        return self.rewards.submit(drawn.images, drawn.prompts, [prompt.metadata for prompt in batch])

    def _prompts_of(self, epoch: int) -> list[Prompt]:
        """The epoch's prompts, `group_size` times each; every prompt once before any comes twice."""
        rng, count = self._rng("prompts", epoch), self.settings.samples // self.settings.group_size
        rounds = -(-count // len(self.prompts))
        order = np.concatenate([rng.permutation(len(self.prompts)) for _ in range(rounds)])[:count]
        return [self.prompts[i] for i in order for _ in range(self.settings.group_size)]

    # learning

    def _advantages(self, rewards: NDArray[np.float64], prompts: Sequence[str]) -> Tensor:
        if self.settings.advantages == "group":
            values = adv.group_advantages(rewards, prompts)
        elif self.settings.advantages == "prompt":
            values = self.tracker.advantages(rewards, prompts)
        else:
            values = adv.batch_advantages(rewards)
        clipped = np.clip(values, -self.settings.advantage_clip, self.settings.advantage_clip)
        return torch.from_numpy(clipped).float().to(self.policy.device)  # Apple's GPU has no fp64

    def _learn(self, epoch: int, rollouts: Rollouts, advantages: Tensor) -> Iterator[Update]:
        images, size = len(advantages), self.settings.update_batch
        total = self.settings.inner_epochs * -(-images // size)
        done = 0
        for inner in range(self.settings.inner_epochs):
            order = self._order(epoch, inner)
            rng = self._rng("steps", epoch, inner)
            chosen = self.settings.train_steps.choose(self.policy.schedule.stochastic, images, rng)
            steps = torch.from_numpy(chosen).to(self.policy.device)
            for start in range(0, images, size):
                yield self._update(rollouts, order[start : start + size], steps, advantages)
                done += 1
                self.progress("training", done, total)

    def _order(self, epoch: int, inner: int) -> Tensor:
        """The images [N] in the order in which they are learnt from."""
        order = self._rng("order", epoch, inner).permutation(self.settings.samples)
        return torch.from_numpy(order).to(self.policy.device)

    def _update(self, rollouts: Rollouts, chosen: Tensor, steps: Tensor, advantages: Tensor) -> Update:
        """One optimiser step on the images `chosen` [n] at their `steps` [K, N]; each process learns from its own."""
        count = len(chosen) * len(steps)
        mine = chosen[rollouts.places[chosen] >= 0]
        learnt = None
        gather = functools.partial(self._gather, rollouts, mine, steps, advantages, 1 / count)
        while learnt is None:
            self.optimisation.forget()
            learnt = self._tried(gather, self.micro_batch, self.timestep_batch)
        log_ratios = torch.cat([advantages[:0], *(log_ratio for log_ratio, _ in learnt)])
        every = self.team.each((log_ratios.cpu(), sum(penalty for _, penalty in learnt)))
        return Update(
            Diagnostics.of(torch.cat([ratios for ratios, _ in every]), self.settings.clip_range),
            self.optimisation.step(),
            sum(penalty for _, penalty in every) / count,
        )

    def _gather(
        self, rollouts: Rollouts, mine: Tensor, steps: Tensor, advantages: Tensor, scale: float
    ) -> list[tuple[Tensor, float]]:
        """`_accumulate` of all images of this process, a micro-batch at a time."""
        return [
            one
            for part in (mine.split(self.micro_batch) if len(mine) else ())
            for one in self._accumulate(
                rollouts.trajectory, rollouts.places[part], steps[:, part], advantages[part], scale
            )
        ]

    def _accumulate(
        self, drawn: Trajectory, images: Tensor, steps: Tensor, advantages: Tensor, scale: float
    ) -> Iterator[tuple[Tensor, float]]:
        """Gather the gradients of a micro-batch: one encoder forward, all its steps, some at a time, one encoder backward."""
        prompts = [drawn.prompts[i] for i in images.tolist()]
        embeddings = self.policy.embed(prompts)
        reference = self._reference(prompts)
        leaf = embeddings.leaf()
        for several in steps.split(self.timestep_batch):
            times = len(several)
            loss, log_ratio, penalty = self._loss(
                drawn,
                images.repeat(times),
                several.flatten(),
                advantages.repeat(times),
                leaf.repeat(times),
                reference and reference.repeat(times),
            )
            self.optimisation.backward(loss * scale)
            yield log_ratio, penalty
        embeddings.backward(leaf)

    def _loss(
        self,
        drawn: Trajectory,
        images: Tensor,
        step: Tensor,
        advantages: Tensor,
        embeddings: Embeddings,
        reference: Embeddings | None,
    ) -> tuple[Tensor, Tensor, float]:
        """Eq. (5) summed over a micro-batch at one step each, plus the KL term; the log-ratios [n]; the summed KL."""
        log_prob, mean = self._log_prob(drawn, images, step, embeddings)
        old = drawn.log_probs[step, images]
        loss = clipped_surrogate(log_prob, old, advantages, self.settings.clip_range).sum()
        penalty = 0.0
        if reference is not None and self.policy.adapter is not None:
            with torch.no_grad(), self.policy.adapter.disabled():
                reference_mean = self._reference_mean(drawn, images, step, reference)
            divergence = reference_kl(mean, reference_mean, self.policy.schedule.sigma_at(step, mean))
            loss = loss + self.settings.kl_weight * divergence.sum()
            penalty = divergence.sum().item()
        return loss, (log_prob - old).detach(), penalty

    def _log_prob(
        self, drawn: Trajectory, images: Tensor, step: Tensor, embeddings: Embeddings
    ) -> tuple[Tensor, Tensor]:
        """log p(x_p | x_t) [n] of the stored states of `images` [n] at their steps [n], and the mean of the step."""
        sample = drawn.latents[step, images]
        kept = None if drawn.unconditional is None else drawn.unconditional[step, images]
        output, _ = self.policy.output(sample, step, embeddings, kept)
        mean = self.policy.schedule.mean(sample, output, step)
        return self.policy.schedule.log_prob(drawn.latents[step + 1, images], mean, step), mean

    def _reference(self, prompts: Sequence[str]) -> Embeddings | None:
        if not self.settings.kl_weight or self.policy.adapter is None:
            return None
        with torch.no_grad(), self.policy.adapter.disabled():
            return self.policy.embed_now(prompts)

    def _reference_mean(self, drawn: Trajectory, images: Tensor, step: Tensor, reference: Embeddings) -> Tensor:
        """The mean of the base model's step from the stored states, both branches by the base."""
        sample = drawn.latents[step, images]
        output, _ = self.policy.output(sample, step, reference)
        return self.policy.schedule.mean(sample, output, step)

    # bookkeeping

    def _warnings(
        self,
        flat: bool,
        skipped: int,
        prompts: Sequence[str],
        diagnostics: Sequence[Diagnostics],
        said: Collection[str],
    ) -> Iterator[str]:
        yield from said
        if skipped:
            yield f"{skipped} updates were passed over: their gradient was not finite"
        if flat:
            among = " among the images of a prompt" if self.settings.advantages == "group" else ""
            yield f"the rewards of this epoch did not vary{among}: nothing could be learnt from it"
        if diagnostics and diagnostics[0].ratio_error > self.ratio_limit:
            yield (
                f"before its first update the ratio differed from 1 by {diagnostics[0].ratio_error:.1e}, above a tenth of "
                f"the clip range ({self.ratio_limit:.1e}): gradients are biased by rounding, which a new run with --precision fp32 mends"
            )
        if self.settings.advantages == "prompt":
            inert = self.tracker.inert(prompts)
            if inert:
                yield (
                    f"{len(inert)} of {len(set(prompts))} prompts have fewer than {self.tracker.minimum} rewards so far: "
                    "they use the statistics of the epoch (more images a prompt, or --advantages group)"
                )

    def _tried(self, work: Callable[[], R], images: int, steps: int = 1) -> R | None:
        """What `work` gives. Where the memory is too full for `images` at `steps` of theirs at once, None, and the steps in a
        pass are halved, else the micro-batch.

        Raises:
            torch.OutOfMemoryError: one image alone is too much.
        """
        done = if_room(work, last=images * steps == 1)
        if done is None:
            if steps > 1:
                left, self.timestep_batch = images * (steps // 2), steps // 2
            else:
                left = self.micro_batch = images // 2
            self._empty()
            self._halved.append(too_full(self.policy.device, images * steps, left))
        return done

    def _rng(self, *purpose: str | int) -> np.random.Generator:
        return np.random.default_rng(derive(self.seed, *purpose))

    @contextmanager
    def _timed(self, phase: Phase) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            if self.policy.device.type == "cuda":
                torch.cuda.synchronize(self.policy.device)
            self._seconds[phase] += time.perf_counter() - start
