"""For scripts: the workflows behind the commands, with the options of the commands as keyword arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from os import PathLike
from pathlib import Path
from typing import Any

from texforce_cli import config
from texforce_cli.errors import UsageError
from texforce_cli.workflows import sample as sampling
from texforce_cli.workflows import train as training
from texforce_cli.workflows.events import Listener, silent
from texforce_cli.workflows.sample import SampleResult
from texforce_cli.workflows.training_run import TrainResult

Text = str | PathLike[str]


def train(
    reward: str | Sequence[str], *, listener: Listener = silent, config_file: Text | None = None, **options: Any
) -> TrainResult:
    """Train as `texforce train` does; `options` are those of the command (`images=2560`, `lr=3e-4`, `out="runs/a"`).

    `listener` is called with each event of `texforce_cli.workflows.events`. Returns where the adapter is and how the
    held-out reward changed.

    Raises:
        TexforceError: a mistake in the options, or a fault of the machine; finished epochs are saved.
    """
    unknown = sorted(set(options) - set(config.FIELDS))
    if unknown:
        raise UsageError(f"unknown option '{unknown[0]}'", f"options: {', '.join(config.FIELDS)}")
    flags = {name: str(value) if isinstance(value, PathLike) else value for name, value in options.items()}
    flags["reward"] = [reward] if isinstance(reward, str) else list(reward)
    return training.train(flags, config_file=Path(config_file) if config_file else None, listener=listener)


def resume(run: Text, *, listener: Listener = silent) -> TrainResult:
    """Go on with a run from its last whole checkpoint.

    Raises:
        TexforceError: there is no run in that folder.
    """
    return training.resume(str(run), {}, listener=listener)


def sample(
    prompts: Sequence[str],
    *,
    out: Text,
    seeds: Sequence[int] = (0,),
    loras: Sequence[Text] = (),
    listener: Listener = silent,
    **options: Any,
) -> SampleResult:
    """Draw each prompt with each seed as `texforce sample` does; `loras` are `PATH` or `PATH:WEIGHT`.

    `options` are the other fields of `texforce_cli.workflows.sample.SampleRequest`.

    Raises:
        TexforceError: a LoRA or model that cannot be used, files that exist already.
    """
    if isinstance(prompts, str):
        raise UsageError("the prompts are one text", 'give a list: sample(["a cat"], ...)')
    known = {field.name for field in dataclasses.fields(sampling.SampleRequest)}
    unknown = sorted(set(options) - known)
    if unknown:
        raise UsageError(f"unknown option '{unknown[0]}'", f"options: {', '.join(sorted(known))}")
    request = sampling.SampleRequest(
        prompts=list(prompts), seeds=list(seeds), out=Path(out), loras=[str(lora) for lora in loras], **options
    )
    return sampling.sample(request, listener)
