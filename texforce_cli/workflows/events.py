"""What a workflow tells whoever is listening. It prints nothing itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what only names a type here would import torch
    from texforce_cli.algorithms.base import EpochReport, Phase, Preflight
    from texforce_cli.core.statistics import Interval


@dataclass(frozen=True)
class Note:
    """Something worth knowing."""

    text: str


@dataclass(frozen=True)
class Warned:
    """Something that may be wrong."""

    text: str


@dataclass(frozen=True)
class Started:
    """A run begins or goes on: its folder, its resolved configuration with origins, and how many epochs are done."""

    folder: Path
    config: Mapping[str, Any]
    origins: Mapping[str, str]
    epochs: int
    done: int
    images: int


@dataclass(frozen=True)
class Checked:
    """The preflight was measured."""

    preflight: Preflight


@dataclass(frozen=True)
class Progressed:
    """`done` of `total` in a phase of the work; `evaluation` is a phase of its own. `reward` as far as it is known."""

    phase: Phase | str
    done: int
    total: int
    reward: float | None = None


@dataclass(frozen=True)
class Watched:
    """A reward that is not trained on, over the held-out pairs; of every one more is better."""

    mean: float
    base_mean: float
    difference: Interval


@dataclass(frozen=True)
class Evaluation:
    """Reward on the held-out pairs. Differences are paired with the base: same prompts, same noise. `watched` by name."""

    epoch: int
    images: int
    mean: float
    base_mean: float
    difference: Interval
    seen: Interval | None
    unseen: Interval | None
    rewards: tuple[float, ...] = field(repr=False)
    base_rewards: tuple[float, ...] = field(repr=False)
    watched: Mapping[str, Watched] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluated:
    """The held-out pairs were drawn and scored."""

    evaluation: Evaluation


@dataclass(frozen=True)
class EpochDone:
    """An epoch is finished and saved."""

    report: EpochReport


Event = Note | Warned | Started | Checked | Progressed | Evaluated | EpochDone
Listener = Callable[[Event], None]


def silent(event: Event) -> None:
    """A listener that does nothing."""
