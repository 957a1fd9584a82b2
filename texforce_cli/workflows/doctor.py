"""Will a run work here: versions, devices, room, plugins, and the ratio preflight on the chosen model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import psutil

from texforce_cli.errors import TexforceError
from texforce_cli.files import user_folder
from texforce_cli.rewards.registry import load_registry
from texforce_cli.workflows.events import Listener, Progressed, silent
from texforce_cli.workflows.plan import plan
from texforce_cli.workflows.run_folder import versions

_FEWEST_GB = 1.0
"""Free space below which a run may not find room for its checkpoints."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at; `trouble` is what should be done about it, "" where it is well."""

    name: str
    value: str
    trouble: str = ""


def examine(
    model: str | None, device: str | None, precision: str | None, listener: Listener = silent
) -> tuple[list[Finding], bool]:
    """Everything that was found, and whether a run on the chosen model will work."""
    findings = [Finding("versions", ", ".join(f"{name} {value}" for name, value in versions().items()))]
    findings += [*_devices(), *_room(), *_plugins()]
    try:
        findings += _model({"model": model, "device": device, "precision": precision}, listener)
    except TexforceError as error:
        findings.append(Finding("model", str(model or "auto"), str(error)))
    ready = not any(finding.trouble for finding in findings if finding.name != "plugins")
    return findings, ready


def document(findings: Sequence[Finding], ready: bool) -> dict[str, Any]:
    """The same as JSON values."""
    return {"doctor": {"ready": ready, "findings": [asdict(finding) for finding in findings]}}


def _devices() -> list[Finding]:
    from texforce_cli.devices import present

    return [Finding("devices", ", ".join(present()))]


def _room() -> list[Finding]:
    memory = psutil.virtual_memory()
    found = [
        Finding("processors", f"{os.cpu_count()} ({len(psutil.Process().cpu_affinity())} for this process)")
        if hasattr(psutil.Process, "cpu_affinity")
        else Finding("processors", str(os.cpu_count())),
        Finding("memory", f"{memory.available / 1e9:.1f} of {memory.total / 1e9:.1f} GB free"),
    ]
    for name, folder in (("disk here", Path.cwd()), ("disk of rewards", user_folder("data"))):
        there = next(path for path in (folder, *folder.parents) if path.exists())
        free = shutil.disk_usage(there).free / 1e9
        trouble = "" if free >= _FEWEST_GB else "make room: a run keeps checkpoints and pictures"
        if not os.access(there, os.W_OK):
            trouble = f"'{there}' cannot be written"
        found.append(Finding(name, f"{free:.1f} GB free", trouble))
    return found


def _plugins() -> list[Finding]:
    registry = load_registry()
    isolated = sum(info.environment is not None for info in registry.rewards.values())
    value = f"{len(registry.names)} rewards, {isolated} in environments of their own"
    broken = "; ".join(f"{origin}: {why}" for origin, why in registry.broken.items())
    return [Finding("plugins", value, f"broken, repair or remove: {broken}" if broken else "")]


def _model(wanted: dict[str, Any], listener: Listener) -> list[Finding]:
    """The model with its device, and what the preflight of a run says of model and precision.

    Raises:
        TexforceError: the model cannot be found or loaded, the device is not there.
    """
    import torch

    from texforce_cli.diffusion.models import load_pipeline
    from texforce_cli.workflows.assembly import (
        make_adapter,
        make_algorithm,
        make_optimisation,
        make_policy,
        make_rewards,
    )

    flags = {"reward": ["brightness"], **{key: value for key, value in wanted.items() if value is not None}}
    made = plan(flags, None)
    if made.source.family == "sd" and made.config.device == "cpu":  # on which 50 steps are hours
        made = plan({**flags, "steps": 2, "micro_batch": "1"}, None)
    config, device = made.config, torch.device(made.config.device)
    found = Finding("model", f"{made.source.name} ({made.source.reason}), on {device}")
    rewards = make_rewards(config, made.registry)
    try:
        pipeline = load_pipeline(made.source, device=device, precision=config.precision)
        adapter = make_adapter(pipeline, config)
        policy = make_policy(pipeline, config, adapter)
        optimisation = make_optimisation(config, policy)
        result = make_algorithm(
            config, policy, rewards, optimisation, made.prompts.seen, lambda *done, **more: listener(Progressed(*done))
        ).preflight()
    except torch.OutOfMemoryError as error:
        raise TexforceError(
            f"the memory of {device} is full",
            "train with --gradient-checkpointing, a smaller --size or fewer --samples-per-epoch",
        ) from error
    finally:
        rewards.close()
    value = f"max |ratio - 1| = {result.ratio_error:.1e} in {config.precision}, limit {result.limit:.1e}"
    remedy = "train with a larger --clip-range" + ("" if config.precision == "fp32" else ", or with --precision fp32")
    return [found, Finding("preflight", value, "" if result.ok else remedy)]
