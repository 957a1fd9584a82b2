"""The seam: what a training run asks of an algorithm, and nothing more.

A run (`workflows/training_run.py`) owns the folder, the checkpoints, the pictures and the signals. An algorithm owns one epoch:
it draws what it needs, changes the adapter through its `Optimisation`, and says what happened. DDPO is the first one.
DPOK and reward-weighted regression need nothing else from the run; ReFL, AlignProp and DRaFT also need rewards that give
gradients, and will report nothing where `EpochReport` speaks of ratios.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

Phase = Literal["sampling", "rewards", "training"]


class Progress(Protocol):
    """Called after each batch and each optimiser step; it may raise to stop the run there."""

    def __call__(
        self, phase: Phase | Literal["preflight", "evaluation"], done: int, total: int, *, reward: float | None = None
    ) -> None:
        """`done` of `total` in a phase of an epoch, or in what is done between them; `reward` is the mean of the epoch's images so far, where some are scored."""
        ...


@dataclass(frozen=True)
class EpochReport:
    """What one epoch did: one line of metrics.jsonl. Rewards are those of the weights before the epoch's updates."""

    epoch: int
    images: int
    reward_mean: float
    reward_std: float
    terms: Mapping[str, Mapping[str, float]]
    approx_kl: float
    """Of the last update: half the mean squared log-ratio (mean over elements)."""
    clip_fraction: float
    ratio_error: float
    """max |ratio - 1| before the first update, where it would be 0 in exact arithmetic."""
    grad_norm: float
    learning_rate: float
    seconds: Mapping[Phase, float]
    reference_kl: float | None = None
    flat: bool = False
    """The rewards did not vary: nothing could be learnt."""
    skipped_updates: int = 0
    """Updates whose gradient was not finite: they changed nothing."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What the rewards have counted in its images: those without a face, say."""
    warnings: tuple[str, ...] = field(default_factory=tuple)


GRADIENT_LIMIT = 0.05
"""For `Preflight.gradient_error`: above the rounding of 16 bits, far below what a wrong kernel does."""


@dataclass(frozen=True)
class Preflight:
    """What is measured before the first epoch: how exact the ratio is, how sensitive each step, and whether a compiled
    network has the gradient that it has uncompiled."""

    ratio_error: float
    limit: float
    steps: tuple[Mapping[str, float], ...]
    """For each step: timestep, sigma, sensitivity, ratio_error, trained (0, 1 or the share of images)."""
    micro_batch: int
    """Images in one pass: as asked for, or as there is room for."""
    gradient_error: float | None = None
    """|g - g'| / |g| of the trained weights' gradients, uncompiled g and compiled g'; None where nothing is compiled."""
    timestep_batch: int = 1
    """Steps of each image in one pass of training."""

    @classmethod
    def worst(cls, found: Sequence[Preflight]) -> Preflight:
        """What several processes have measured, as one: of each number the worst."""
        steps = zip(*(one.steps for one in found))
        gradients = [one.gradient_error for one in found if one.gradient_error is not None]
        return replace(
            found[0],
            ratio_error=max(one.ratio_error for one in found),
            steps=tuple({**same[0], "ratio_error": max(one["ratio_error"] for one in same)} for same in steps),
            micro_batch=min(one.micro_batch for one in found),
            timestep_batch=min(one.timestep_batch for one in found),
            gradient_error=max(gradients, default=None),
        )

    @property
    def ratio_ok(self) -> bool:
        """Whether the ratio with unchanged weights is near enough to 1."""
        return self.ratio_error <= self.limit

    @property
    def gradient_ok(self) -> bool:
        """Whether compiling has left the gradient as it was."""
        return self.gradient_error is None or self.gradient_error <= GRADIENT_LIMIT

    @property
    def ok(self) -> bool:
        """Whether training can be begun."""
        return self.ratio_ok and self.gradient_ok


class Algorithm(Protocol):
    """One way to learn from rewards."""

    def preflight(self) -> Preflight:
        """Measure without learning."""
        ...

    def run_epoch(self, epoch: int) -> EpochReport:
        """Learn from one epoch of images. All randomness is derived from the run's seed and `epoch`."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What has to be kept between epochs beside the optimiser: plain JSON values."""
        ...

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a `state_dict`."""
        ...
