"""`texforce train`: begin a run, or go on with one."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from texforce_cli.config import TrainConfig, differences, given
from texforce_cli.devices import resolve_device
from texforce_cli.diffusion.models import fingerprint, resolve_model
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import held, write_text
from texforce_cli.prompts import read_prompts
from texforce_cli.rewards.registry import load_registry
from texforce_cli.rewards.terms import find, parse_terms
from texforce_cli.team import Team, joined, launched
from texforce_cli.team import team as team_of
from texforce_cli.workflows import checkpoint as checkpoints
from texforce_cli.workflows.assembly import Scoring, make_scoring
from texforce_cli.workflows.events import (
    Listener,
    Note,
    Warned,
    silent,
)
from texforce_cli.workflows.learner import follow, lead
from texforce_cli.workflows.plan import Plan, plan
from texforce_cli.workflows.run_folder import RunFolder, versions
from texforce_cli.workflows.training_run import TrainingRun, TrainResult


def train(
    flags: Mapping[str, Any], *, config_file: Path | None = None, listener: Listener = silent, stem: str | None = None
) -> TrainResult:
    """Begin a run and see it through, in `--out` or the first free `runs/<stem>-<n>`.

    Raises:
        UsageError, TexforceError: a mistake of the user or a fault of the machine; finished epochs are saved.
        Interrupted: Ctrl-C or SIGTERM.
    """
    if launched()[0]:
        return _followed()
    made = plan(flags, config_file)
    _warn_of_broken_plugins(made, listener)
    listener(Note(f"model: {made.source.name} ({made.source.reason}), on {made.config.device}"))
    for sentence in made.advice():
        listener(Note(sentence))
    reward = made.config.reward[0].partition(":")[0]
    with contextlib.closing(make_scoring(made.config, made.registry)) as scoring:
        folder = RunFolder.create(made.config.out, stem or f"{reward}-{made.source.short_name}")
        made = replace(made, config=replace(made.config, out=str(folder.path)))
        try:
            with _leading(made, scoring) as team:
                run = TrainingRun(folder, made, scoring, listener, team=team)
                with held(folder.path):
                    write_text(folder.prompts, made.prompts.to_jsonl())
                    run.write_record(status="running")
                    return run.run()
        finally:
            folder.remove_if_empty()  # where nothing has begun a second try finds the same name free


def resume(
    path: str, flags: Mapping[str, Any], *, config_file: Path | None = None, listener: Listener = silent
) -> TrainResult:
    """Continue a run from its last whole checkpoint, to the same bits as if it had not stopped (on a CPU).

    Raises:
        UsageError: no run there, or options that differ from those of the run.
        TexforceError: the model is not the one that the run began with; another process works in the folder.
    """
    if launched()[0]:
        return _followed()
    folder = RunFolder.open(path)
    with held(folder.path):
        folder.remove_leftovers()
        return _resumed(folder, given(flags, config_file), listener)


def _resumed(folder: RunFolder, wanted: dict[str, Any], listener: Listener) -> TrainResult:
    made = recorded_plan(folder)
    _warn_of_broken_plugins(made, listener)
    _refuse_other_options(folder, made.config, wanted)
    record = folder.read_record()
    _refuse_other_model(folder, made, record, listener)
    found, damaged = checkpoints.load_latest(folder.checkpoints)
    for sentence in damaged:
        listener(Warned(sentence))
    if found is None:
        listener(Warned("there is no whole checkpoint: beginning again"))
        checkpoints.remove_after(folder.checkpoints, 0)
    free = {name: wanted[name] for name in _FREE if name in wanted}
    if launched()[1] > 1:  # the launcher's number counts, not the one that the run began with
        free.setdefault("num_processes", 1)
    made = replace(made, config=replace(made.config, **free))
    with contextlib.closing(make_scoring(made.config, made.registry)) as scoring, _leading(made, scoring) as team:
        return TrainingRun(folder, made, scoring, listener, team=team, checkpoint=found).run()


_FREE = ("num_processes", "process_timeout", "save_within")
"""Options that may change when a run goes on: they do not change its result."""


@contextlib.contextmanager
def _leading(made: Plan, scoring: Scoring) -> Iterator[Team]:
    """The team of the run, told which run it is; it hears what goes wrong within the block."""
    config = made.config
    with team_of(config.num_processes, config.device, follow) as team:
        try:
            fewest = min(config.update_batch, config.samples_per_epoch)
            if team.size > fewest:
                raise UsageError(
                    f"{team.size} processes are more than the {fewest} images of an update",
                    "give fewer, or larger updates",
                )
            lead(team, config, made.prompts, scoring)
            yield team
        except BaseException as error:
            team.leave(error)
            raise


def _followed() -> TrainResult:
    """This process of a launcher is not the leader: it does what the leader does, whatever its command says."""
    with contextlib.closing(joined()) as place:
        try:
            result: TrainResult = follow(place)
        except TexforceError:
            if not place.told:
                raise
            time.sleep(_AFTER_THE_LEADER)
            raise SystemExit(1) from None
        place.part()
        return result


_AFTER_THE_LEADER = 2.0
"""Seconds: a launcher kills the others when the first one ends, and the leader shall have spoken by then."""


def recorded_plan(folder: RunFolder) -> Plan:
    """The plan of a run as its folder holds it.

    Raises:
        UsageError: the device of the run is not available here.
        TexforceError: the record is damaged.
    """
    record = folder.read_record()
    try:
        config = TrainConfig(**record["config"])
        about, origins, reason = record["prompts"], record["origins"], record["model"]["reason"]
        prompts = replace(read_prompts(folder.prompts), name=about["name"], source=about["source"])
    except (KeyError, TypeError) as error:
        raise folder.damaged(error) from error
    resolve_device(config.device)
    registry = load_registry()
    infos = tuple(find(spec, registry) for spec in parse_terms(config.reward, config.reward_option))
    return Plan(config, origins, replace(resolve_model(config.model), reason=reason), prompts, registry, infos)


def _warn_of_broken_plugins(made: Plan, listener: Listener) -> None:
    for origin, reason in made.registry.broken.items():
        listener(Warned(f"plugin '{origin}' could not be loaded: {reason}"))
    for origin, seconds in made.registry.slow.items():
        listener(Warned(f"plugin '{origin}' takes {seconds:.1f} s to register its rewards"))


def _refuse_other_options(folder: RunFolder, config: TrainConfig, wanted: dict[str, Any]) -> None:
    if "model" in wanted:
        wanted["model"] = resolve_model(wanted["model"]).reference
    if "device" in wanted:
        wanted["device"] = str(resolve_device(wanted["device"]))
    recorded = dataclasses.asdict(config)
    changed = differences(recorded, {**recorded, **wanted}, ignore=("out", "init_lora", *_FREE))
    if changed:
        raise UsageError(
            f"'{folder.path}' was begun with other options: {', '.join(changed)}",
            f"resume without them, or begin a new run with --config {folder.path / 'config.toml'}",
        )


def _refuse_other_model(folder: RunFolder, made: Plan, record: Mapping[str, Any], listener: Listener) -> None:
    for key, value in fingerprint(made.source).items():
        if record["model"].get(key) != value:
            raise TexforceError(
                f"the model '{made.source.name}' has changed since '{folder.path}' was begun ({key} is now {value})",
                "restore it, or begin a new run",
            )
    here, there = versions(), record.get("versions", {})
    other = [f"{name} {there[name]} then, {here[name]} now" for name in there if here.get(name, "") != there[name]]
    if other:
        listener(Warned(f"other versions than the run began with: {'; '.join(other)}; it may end with other bits"))
