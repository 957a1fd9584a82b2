"""What of a run is done by all its processes together: the leader calls, the others follow."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from texforce_cli.algorithms.base import EpochReport, Preflight, Progress
from texforce_cli.algorithms.ddpo import Kept
from texforce_cli.config import DIVERSITY, TrainConfig
from texforce_cli.devices import claim, keep_memory, same_bits
from texforce_cli.diffusion.models import fingerprint, load_pipeline, resolve_model
from texforce_cli.errors import TexforceError, Unsuited, first_line
from texforce_cli.prompts import PromptSet
from texforce_cli.rewards.registry import load_registry
from texforce_cli.team import Team, machine
from texforce_cli.team.processes import Processes
from texforce_cli.workflows.assembly import (
    Scoring,
    make_adapter,
    make_algorithm,
    make_optimisation,
    make_policy,
    make_scoring,
)
from texforce_cli.workflows.cost import ways_to_save
from texforce_cli.workflows.drafts import Drafts
from texforce_cli.workflows.events import Evaluation
from texforce_cli.workflows.heldout import HeldOut
from texforce_cli.workflows.run_folder import RunFolder
from texforce_cli.workflows.stopping import StopRequest

P = ParamSpec("P")
R = TypeVar("R")


def _together(method: Callable[Concatenate[Learner, P], R]) -> Callable[Concatenate[Learner, P], R]:
    """A method that every process runs when the leader does."""

    @functools.wraps(method)
    def called(self: Learner, /, *args: P.args, **kwargs: P.kwargs) -> R:
        self.team.of_leader((method.__name__, args, kwargs))
        return method(self, *args, **kwargs)

    return called


class Learner:
    """The model, its adapter, the algorithm and the held-out pairs of one process. Writes drafts at most."""

    def __init__(
        self,
        config: TrainConfig,
        prompts: PromptSet,
        scoring: Scoring,
        *,
        team: Team,
        progress: Progress,
        begin: bool,
        warn: Callable[[str], None] = lambda text: None,
        drafts: Kept | None = None,
    ) -> None:
        """`begin`: a new run, whose adapter takes over `--init-lora`. `warn` hears what a measurement has to say."""
        self.team = team
        device = torch.device(team.device(config.device))
        same_bits()
        pipeline = load_pipeline(resolve_model(config.model), device=device, precision=config.precision)
        if device.type == "cpu":
            keep_memory()
        self.adapter = make_adapter(pipeline, config, begin=begin)
        self.policy = make_policy(pipeline, config, self.adapter)
        self.policy.passed = team.get_on
        self.optimisation = make_optimisation(config, self.policy, team)
        self.drafts = drafts or Kept()
        self.algorithm = make_algorithm(
            config, self.policy, scoring.rewards, self.optimisation, prompts.seen, progress, team, self.drafts
        )
        self.heldout = HeldOut(
            prompts,
            config.eval_images,
            self.policy,
            scoring.rewards,
            batch=config.micro_batch,
            steps=config.eval_steps,
            watch=scoring.watches,
            diversity_at=config.watch.index(DIVERSITY) if config.watches_diversity else None,
            team=team,
            warn=warn,
        )
        self.progress = progress
        team.be_patient(config.process_timeout)

    @_together
    def restore(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """The weights, the optimiser and the algorithm of a checkpoint."""
        self.adapter.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("lora.")})
        self.optimisation.load(tensors, numbers["optimisation"])
        self.algorithm.load_state_dict(numbers["algorithm"])

    @_together
    def preflight(self) -> Preflight:
        """What the algorithm measures before it learns."""
        return self.algorithm.preflight()

    @_together
    def epoch(self, index: int) -> EpochReport:
        """Learn from one epoch; what it has drawn outlives its being broken off."""
        try:
            return self.algorithm.run_epoch(index)
        except Exception:
            self.drafts.save()
            raise

    @_together
    def measure_base(self) -> None:
        """Draw and score the held-out pairs with the base model."""
        self.heldout.measure_base(self._measuring)

    @_together
    def measure(self, epoch: int, images: int) -> Evaluation:
        """Draw and score the held-out pairs, by the averaged weights where there are some."""
        with self.optimisation.averaged():
            return self.heldout.measure(epoch, images, self._measuring)

    @_together
    def end(self, result: object) -> object:
        """The last call, with what the run has come to."""
        return result

    def tensors(self) -> dict[str, Tensor]:
        """The exact parameters as they are trained (not their average) and the optimiser's moments."""
        lora = {f"lora.{name}": value for name, value in self.adapter.state_dict().items()}
        return lora | self.optimisation.tensors()

    def numbers(self) -> dict[str, Any]:
        """The rest of what `restore` needs: plain JSON values."""
        return {"optimisation": self.optimisation.numbers(), "algorithm": self.algorithm.state_dict()}

    def follow(self) -> Any:
        """Do what the leader does until it ends; what the run has come to."""
        while True:
            name, args, kwargs = self.team.of_leader()
            result = getattr(Learner, name).__wrapped__(self, *args, **kwargs)
            if name == "end":
                return result

    def _measuring(self, done: int, total: int) -> None:
        self.progress("evaluation", done, total)


def memory_full(config: TrainConfig, error: torch.OutOfMemoryError) -> Unsuited:
    """What is said of a memory that is full whatever was halved. What takes less changes the result."""
    cause = f" ({first_line(error)})" if error.__cause__ else ""
    return Unsuited(
        f"the memory of {config.device} is full, even for few images at once{cause}",
        f"use {ways_to_save(config, 1)}",
    )


def lead(team: Team, folder: RunFolder, config: TrainConfig, prompts: PromptSet, scoring: Scoring) -> None:
    """Tell the others which run it is, and lend those of this machine the reward workers."""
    if isinstance(team, Processes):
        team.of_leader((folder, asdict(config), prompts, fingerprint(resolve_model(config.model)), scoring.packages))
        team.each(machine())
        team.each(scoring.lend())
        team.compute(config.device, config.process_timeout)


def follow(team: Processes) -> Any:
    """A process that is not the leader, from its beginning to its end: returns what the leader does.

    Raises:
        TexforceError: as `texforce train`, and the leader is told; the leader ended, or has told.
    """
    try:
        folder, values, prompts, made_of, scored_by = team.of_leader()
        config = TrainConfig(**values)
        stop = StopRequest(config.save_within)
        claim(team.device(config.device))  # before the rewards, which choose a GPU too

        def progress(phase: str, done: int, total: int, *, reward: float | None = None) -> None:
            stop.check(saved_in=0.0)  # whether an epoch is finished is the leader's to say
            team.look()

        with stop.listening(), contextlib.closing(_scoring_beside(team, config)) as scoring:
            team.shield, team.heed = stop.shielded, stop.heed
            if fingerprint(resolve_model(config.model)) != made_of:
                raise TexforceError(f"the model '{config.model}' is another one here", "give the processes the same")
            if scoring.packages != scored_by:
                raise TexforceError(
                    f"the rewards come from {_listed(scoring.packages)} here and from {_listed(scored_by)} at the leader",
                    "install the same on every machine",
                )
            team.compute(config.device, config.process_timeout)
            learner = Learner(
                config,
                prompts,
                scoring,
                team=team,
                progress=progress,
                begin=False,
                drafts=Drafts(folder, config.draft_every, team.device(config.device), compiled=config.compile),
            )
            return learner.follow()
    except (Unsuited, torch.OutOfMemoryError) as error:
        unsuited = error if isinstance(error, Unsuited) else memory_full(config, error)
        told = folder.anew(unsuited)
        team.leave(told)
        raise told from error
    except BaseException as error:
        team.leave(error)
        raise


def _listed(packages: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in packages.items())


def _scoring_beside(team: Team, config: TrainConfig) -> Scoring:
    """What scores in a process that is not the leader: the workers are those of the machine's first process."""
    machines = team.each(machine())
    first = machines.index(machine())
    registry = load_registry()
    if first == team.rank:
        scoring = make_scoring(config, registry)
        team.each(scoring.lend())
        return scoring
    return make_scoring(config, registry, team.each(None)[first])
