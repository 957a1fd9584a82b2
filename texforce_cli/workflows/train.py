"""`texforce train`: begin a run, or go on with one."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from texforce_cli.config import FIELDS, TrainConfig, differences, given, resolve
from texforce_cli.devices import claim, present, resolve_device
from texforce_cli.diffusion.models import fingerprint, pinned, resolve_model
from texforce_cli.errors import TexforceError, UsageError, quoted
from texforce_cli.files import held, user_path, write_text
from texforce_cli.prompts import read_prompts
from texforce_cli.rewards.registry import load_registry
from texforce_cli.rewards.terms import find, parse_terms
from texforce_cli.team import Team, launched
from texforce_cli.team.start import joined
from texforce_cli.team.start import team as team_of
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
from texforce_cli.workflows.run_folder import RunFolder, made_with
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
    made = plan(flags, config_file).pinned()
    for sentence in made.registry.complaints():
        listener(Warned(sentence))
    listener(Note(f"model: {made.source.name} ({made.source.reason}), on {made.config.device}"))
    for sentence in made.advice():
        listener(Note(sentence))
    reward = made.config.reward[0].partition(":")[0]
    with contextlib.closing(make_scoring(made.config, made.registry)) as scoring:
        folder = RunFolder.create(made.config.out, stem or f"{reward}-{made.source.short_name}")
        made = replace(made, config=replace(made.config, out=str(folder.path)))
        with held(folder.path):  # before the model is loaded, which takes long enough for another run to begin here
            folder.refuse_taken()
            folder.remove_leftovers()
            try:
                with _leading(folder, made, scoring) as team:
                    run = TrainingRun(folder, made, scoring, listener, team=team)
                    write_text(folder.prompts, made.prompts.to_jsonl())
                    run.write_record(status="running")
                    return run.run()
            finally:
                folder.remove_unbegun()  # a second try finds the same name free


def begun(flags: Mapping[str, Any], config_file: Path | None = None) -> str | None:
    """The run that `--auto-resume` goes on with: the one in `--out`; None where none has begun there.

    Raises:
        UsageError: no `--out`, or another mistake in the options.
    """
    out = resolve(flags, config_file).config.out
    if out is None:
        raise UsageError("--auto-resume goes on with the run in --out", "add --out FOLDER")
    return out if RunFolder(user_path(out)).record.is_file() else None


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
    made = recorded_plan(folder, wanted)
    for sentence in made.registry.complaints():
        listener(Warned(sentence))
    record = folder.read_record()
    _refuse_other_model(folder, made, record)
    if record.get("status") == "finished":
        listener(Note(f"'{folder.path}' had finished"))
    found, damaged = checkpoints.load_latest(folder.checkpoints)
    for sentence in damaged:
        listener(Warned(sentence))
    if found is None:
        listener(Warned("there is no whole checkpoint: beginning again"))
        checkpoints.remove_after(folder.checkpoints, 0)
    if launched()[1] > 1 and "num_processes" not in wanted:  # the launcher's number counts, not the recorded one
        made = replace(made, config=replace(made.config, num_processes=1))
    claim(made.config.device)
    with (
        contextlib.closing(make_scoring(made.config, made.registry)) as scoring,
        _leading(folder, made, scoring) as team,
    ):
        for sentence in made.of_this_machine():
            listener(Warned(sentence))
        _warn_of_other_versions(made.config, scoring, record, listener)  # the processes of a team share the threads
        return TrainingRun(folder, made, scoring, listener, team=team, checkpoint=found).run()


_FREE = (
    *("num_processes", "process_timeout", "save_within", "save_every", "draft_every", "keep", "log", "device"),
    *("reward_host", "reward_workers", "reward_timeout", "reward_memory", "compile"),
)
"""Options that may change when a run goes on: they change its result by rounding at most."""


@contextlib.contextmanager
def _leading(folder: RunFolder, made: Plan, scoring: Scoring) -> Iterator[Team]:
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
            lead(team, folder, config, made.prompts, scoring)
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


def recorded_plan(folder: RunFolder, wanted: Mapping[str, Any]) -> Plan:
    """The plan of a run as its folder holds it, going on with the options `wanted`.

    Raises:
        UsageError: the device of the run is not available here; options that would change the result.
        TexforceError: the record is damaged.
    """
    record = folder.read_record()
    try:
        if unknown := [name for name in record["config"] if name not in FIELDS]:
            raise TexforceError(
                f"'{folder.path}' was begun with texforce {record['versions']['texforce']}, whose option '{unknown[0]}'"
                " is unknown here",
                "go on with that version",
            )
        config = TrainConfig(**record["config"])
        about, origins, reason = record["prompts"], record["origins"], record["model"]["reason"]
        if commit := record["model"].get("revision"):  # older runs have the name of a branch as their model
            config = replace(config, model=f"{record['model']['location']}@{commit}")
        prompts = replace(read_prompts(folder.prompts), name=about["name"], source=about["source"])
    except (KeyError, TypeError) as error:
        raise folder.damaged(error) from error
    wanted = _unchanging(folder, config, origins, wanted)
    # an option that is younger than the run has its default
    origins = {**dict.fromkeys(FIELDS, "default"), **origins, **dict.fromkeys(wanted, "resume")}
    config = replace(config, **wanted)
    if _is_path(config.model) and not Path(config.model).exists():
        raise UsageError(f"the model '{config.model}' of '{folder.path}' is not there", "say where it is with --model")
    registry = load_registry()
    terms = parse_terms(config.reward, config.reward_option, beside=config.watched_rewards)
    infos = tuple(find(spec, registry) for spec in terms)
    return Plan(config, origins, replace(resolve_model(config.model), reason=reason), prompts, registry, infos)


def _unchanging(
    folder: RunFolder, config: TrainConfig, origins: Mapping[str, str], wanted: Mapping[str, Any]
) -> dict[str, Any]:
    """Those of the options `wanted` that may change; the others must be as they were."""
    asked, free = dict(wanted), set(_FREE)
    try:
        device = resolve_device(asked.get("device", config.device))
    except UsageError as error:
        if "device" in asked:
            raise
        kind, _, number = config.device.partition(":")
        others = [name.partition(" ")[0] for name in present() if number and name.startswith(f"{kind}:")]
        there = next((f"say --device {name}" for name in others if name != config.device), "resume it where it is")
        raise UsageError(
            f"'{folder.path}' was begun on a device that cannot be used: {error.message}",
            f"{there}, or begin a new run with --config {quoted(folder.config)} --device auto",
        ) from error
    if "model" in asked:
        source = resolve_model(asked["model"], str(device))
        if asked["model"] == config.model.partition("@")[0]:
            del asked["model"]  # no commit is asked for: the run's own
        else:
            asked["model"] = pinned(source).reference
        if source.local and _is_path(config.model):
            free.add("model")  # it may have been moved; its hashes tell whether it is the same
    if "device" in asked:
        asked["device"] = str(device)
    if device.type != config.device.partition(":")[0]:
        free.remove("device")  # another GPU of the kind gives the same result, another kind does not
    if device.type != "cuda":  # where auto is the preset's micro-batch, and one step
        asked.pop("fit_micro_batch", None)
        if asked.get("timestep_batch") == 0:
            del asked["timestep_batch"]
    if asked.get("preset") == "auto":
        del asked["preset"]
    divided = "micro_batch" not in asked and origins["micro_batch"] == "default, resolved"
    if divided and asked.get("grad_accum", 0) * TrainConfig.micro_batch == config.update_batch:
        del asked["grad_accum"]  # of the default micro-batches: the same update
    recorded = dataclasses.asdict(config)
    changed = differences(recorded, {**recorded, **asked}, ignore=("out", "init_lora", *free))
    if changed:
        raise UsageError(
            f"'{folder.path}' was begun with other options: {', '.join(changed)}",
            f"resume without them, or begin a new run with --config {folder.config}",
        )
    return {name: value for name, value in asked.items() if name in free}


def _is_path(model: str) -> bool:
    """Whether a recorded `--model` is a folder or file."""
    return Path(model).is_absolute()


def _refuse_other_model(folder: RunFolder, made: Plan, record: Mapping[str, Any]) -> None:
    for key, value in fingerprint(made.source).items():
        if value not in record["model"].values():  # whatever its file is called now
            raise TexforceError(
                f"the model '{made.source.name}' has changed since '{folder.path}' was begun ({key} is now {value})",
                "restore it, or begin a new run",
            )


def _warn_of_other_versions(
    config: TrainConfig, scoring: Scoring, record: Mapping[str, Any], listener: Listener
) -> None:
    here, there = {**made_with(), **scoring.made_from}, dict(record.get("versions", {}))
    if config.device != "cpu":
        there.pop("threads", None)
    other = {name: here.get(name, "none") for name in there if here.get(name) != there[name]}
    if other:
        listed = "; ".join(f"{name} {there[name]} then, {now} now" for name, now in other.items())
        paid = " and be rewarded differently" if other.keys() & scoring.made_from.keys() else ""
        listener(Warned(f"other versions than the run began with: {listed}; it may end with other bits{paid}"))
