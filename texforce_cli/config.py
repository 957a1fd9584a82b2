"""Every option of a training run, once: its type, default, help and check.

The command line, `--config FILE.toml`, the environment (TEXFORCE_*), presets, the Python API and the run folder all read
this one dataclass. Standard library only, so that `--help` stays quick.
"""

from __future__ import annotations

import dataclasses
import math
import os
import tomllib
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from texforce_cli.core.train_steps import TrainSteps
from texforce_cli.errors import UsageError, did_you_mean, is_utf8
from texforce_cli.presets import PRESET_NAMES, PRESETS, Family, automatic_preset, preset_values

ENVIRONMENT = "TEXFORCE_"
DIVERSITY = "diversity"
"""Its name among rewards and metrics."""
FIRST, MODEL, SAMPLING, ADAPTER, LEARNING, REWARDS, EVALUATION, OUTPUT = (
    "The ones that matter first",
    "Model",
    "Sampling",
    "LoRA",
    "Optimisation",
    "Rewards",
    "Evaluation",
    "Output",
)


def option(
    default: Any, panel: str, help: str, check: Callable[[Any], str | None] | None = None, *, unit: str = ""
) -> Any:
    """A field with its help panel and text; `check` returns what is wrong with a value, or None; `unit` may stand behind it.
    One without a panel is no option of the command line: it is recorded, and files may say it."""
    about = {"panel": panel, "help": help, "check": check, "unit": unit}
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=about)
    return dataclasses.field(default=default, metadata=about)


def _above(low: float) -> Callable[[float], str | None]:
    return lambda value: None if value > low else f"must be above {low:g}"


def _between(low: float, high: float) -> Callable[[float], str | None]:
    return lambda value: None if low <= value <= high else f"must be between {low:g} and {high:g}"


def _train_steps(text: str) -> str | None:
    try:
        TrainSteps.parse(text)
    except ValueError as error:
        return str(error)
    return None


def _no_or_several(value: int) -> str | None:
    return None if value == 0 or value > 1 else "must be 0, or 2 and more"


_positive, _not_negative = _above(0), _between(0, math.inf)


@dataclass(frozen=True)
class TrainConfig:
    """The options of `texforce train`. `auto` and None are replaced by a value before a run begins."""

    reward: list[str] = option([], FIRST, "What to train for: NAME[:WEIGHT]; may be repeated.")
    model: str = option(
        "auto", FIRST, "tiny, sd14, sd15, sd21, sd21-base, a folder, FILE.safetensors, or OWNER/NAME[@REVISION]."
    )
    train: Literal["text-encoder", "unet", "both"] = option("text-encoder", FIRST, "Which part learns, through LoRA.")
    prompts: str = option("animals", FIRST, "A prompt set by name, or FILE.txt, FILE.jsonl, FILE.csv.")
    images: int | None = option(
        None, FIRST, "Training budget in images, as the paper counts (sets the epochs).", _positive
    )
    preset: str = option("auto", FIRST, f"Settings that belong together: {', '.join(PRESET_NAMES)}.")
    lr: float = option(3e-4, FIRST, "Learning rate of AdamW.", _positive)
    kl: float = option(
        0.0, FIRST, "Weight of the KL divergence to the base model: holds the pictures near it.", _not_negative
    )
    seed: int = option(0, FIRST, "Seed of everything random.", _not_negative)
    out: str | None = option(None, FIRST, "Run folder, new. Default: runs/<reward>-<model>-<n>.")

    device: str = option("auto", MODEL, "auto, cpu, cuda, cuda:1, mps.")
    precision: Literal["fp32", "bf16", "fp16"] = option(
        "fp32",
        MODEL,
        "Of the frozen weights; steps and LoRA stay fp32. Stable Diffusion on a CUDA or ROCm GPU takes bf16 or fp16, --preset "
        "fast bf16 on a CPU that multiplies in it.",
    )
    gradient_checkpointing: bool = option(False, MODEL, "Less memory, more time.")
    compile: bool = option(
        False, MODEL, "torch.compile the blocks of the U-Net; their gradient is checked before the run."
    )
    num_processes: int = option(
        1, MODEL, "Share the work among so many processes here, a GPU each; the result is the same.", _between(1, 64)
    )
    process_timeout: float = option(
        600.0,
        MODEL,
        "Seconds after which a process that does not answer, and makes no U-Net pass, ends the job.",
        _positive,
        unit="s",
    )

    steps: int = option(50, SAMPLING, "Denoising steps.", _positive)
    guidance: float = option(
        5.0, SAMPLING, "Classifier-free guidance, in sampling and training; 1 = none.", _between(1, 100)
    )
    eta: float = option(1.0, SAMPLING, "Noise of the DDIM steps: 1 as in DDPM.", _between(0.001, 1))
    size: int | None = option(None, SAMPLING, "Width and height in pixels. Default: the model's own.", _positive)
    negative_prompt: str = option("", SAMPLING, "What the unconditional branch is given.")
    uncond_embedding: Literal["trained", "snapshot", "base"] = option(
        "trained",
        SAMPLING,
        "Weights that embed the negative prompt: as trained; of the epoch's start, or of the base (approximations).",
    )

    rank: int = option(16, ADAPTER, "Rank of the LoRA.", _positive)
    alpha: float | None = option(None, ADAPTER, "Scale of the LoRA; default the rank.", _positive)
    init_lora: str | None = option(None, ADAPTER, "Start from this LoRA: PATH[:WEIGHT].")
    ema: float = option(
        0.0, ADAPTER, "Decay of an average of the weights, which is what is kept; 0 = none.", _between(0, 0.99999)
    )

    epochs: int | None = option(None, LEARNING, "Epochs, instead of --images.", _positive)
    samples_per_epoch: int = option(512, LEARNING, "Images drawn in an epoch.", _positive)
    group_size: int = option(1, LEARNING, "Images of each prompt in an epoch (1: the paper's).", _positive)
    advantages: Literal["group", "prompt", "batch"] = option(
        "prompt", LEARNING, "Compare an image with its prompt's in this epoch, its prompt's so far (paper), or all."
    )
    adv_clip: float = option(5.0, LEARNING, "Advantages are clipped to +- this.", _positive)
    normalize_rewards: bool = option(False, LEARNING, "Standardise each reward over the epoch before weighting.")
    micro_batch: int = option(
        8,
        LEARNING,
        "Images in one pass through the U-Net; auto (the default for Stable Diffusion on a CUDA or ROCm GPU): what fits.",
        _positive,
    )
    fit_micro_batch: bool = option(
        False, "", "What --micro-batch auto stands for: start from the preset's or the file's and double it."
    )
    timestep_batch: int = option(
        0,
        LEARNING,
        "Steps of an image in one pass of training; auto (the default): on a CUDA or ROCm GPU as many as fit, else 1.",
        _not_negative,
    )
    grad_accum: int = option(
        32,
        LEARNING,
        "Micro-batches in one update; by default as many as have the images of the preset's update.",
        _positive,
    )
    inner_epochs: int = option(1, LEARNING, "Passes over an epoch's images.", _positive)
    clip_range: float = option(1e-4, LEARNING, "lambda of Eq. 5.", _positive)
    clip_convention: Literal["mean", "joint"] = option(
        "mean", LEARNING, "clip_range bounds the mean log-ratio over latent elements, or their joint one."
    )
    train_steps: str = option(
        "random:0.5",
        LEARNING,
        "Denoising steps to train: first:N, random:F, all; window:K, the first K, which alone draw noise then (an approximation).",
        _train_steps,
    )
    kl_target: float | None = option(
        None, LEARNING, "Steer the learning rate so that approx_kl approaches this.", _positive
    )
    lr_schedule: Literal["constant", "cosine", "linear"] = option("cosine", LEARNING, "After the warm-up.")
    warmup: float = option(0.03, LEARNING, "Share of the updates with a rising learning rate.", _between(0, 1))
    weight_decay: float = option(1e-4, LEARNING, "Of AdamW.", _not_negative)
    grad_norm: float = option(
        1.0,
        LEARNING,
        "Gradients are clipped to this norm; one that is not finite is passed over, too many end the run.",
        _positive,
    )

    reward_option: list[str] = option([], REWARDS, "Option of a reward or --watch: NAME.key=value; may be repeated.")
    reward_timeout: float = option(
        120.0, REWARDS, "Seconds that a batch may take a reward in an environment of its own.", _positive, unit="s"
    )
    reward_workers: int = option(1, REWARDS, "Processes for each such reward, and on each host.", _between(1, 64))
    reward_memory: float | None = option(
        None, REWARDS, "GB of address space that such a process may take (on a CPU).", _positive
    )
    reward_host: list[str] = option(
        [], REWARDS, "Score there instead, over ssh: [NAME=]user@host[:PYTHON]; may be repeated."
    )

    eval_images: int = option(
        16, EVALUATION, "Held-out pictures (half of unseen prompts) to measure on, 2 or more; 0 = none.", _no_or_several
    )
    eval_steps: int | None = option(
        None,
        EVALUATION,
        "Denoising steps of these pictures; default: as many as in training (to train in fewer is an approximation).",
        _positive,
    )
    eval_every: int = option(5, EVALUATION, "Epochs between measurements; 0 = only before and after.", _not_negative)

    watch: list[str] = option(
        [],
        EVALUATION,
        "Measure the held-out pictures by this reward too, one not trained on, or by their diversity from seed to seed; "
        "may be repeated.",
    )
    watch_patience: int = option(
        0,
        EVALUATION,
        "End the run after so many measurements in a row with the first --watch surely below the base; 0 = never.",
        _not_negative,
    )

    save_every: int = option(10, OUTPUT, "Epochs between checkpoints that are kept for good; 0 = none.", _not_negative)
    save_within: float = option(
        0.0,
        OUTPUT,
        "Seconds between SIGTERM and the scheduler's kill: an epoch that ends within them is finished and saved; a tenth of them, at "
        "most 5, is for the last writes.",
        _not_negative,
        unit="s",
    )
    draft_every: float = option(
        120.0,
        OUTPUT,
        "Seconds between savings of what an unfinished epoch has drawn, some MB an image of Stable Diffusion; 0 = never.",
        _not_negative,
        unit="s",
    )
    keep: int = option(2, OUTPUT, "How many of the last checkpoints to keep.", _positive)
    log: Literal["none", "tensorboard", "wandb"] = option("none", OUTPUT, "Also log the metrics there.")

    @property
    def update_batch(self) -> int:
        """Images in one optimiser step."""
        return self.micro_batch * self.grad_accum

    @property
    def updates_per_epoch(self) -> int:
        """Optimiser steps in one epoch."""
        return self.inner_epochs * -(-self.samples_per_epoch // self.update_batch)

    @property
    def reuses_unconditional(self) -> bool:
        """Whether learning takes the unconditional branch from drawing: it trains one branch, and keeps another output a step."""
        return self.guidance != 1 and self.uncond_embedding != "trained" and self.train == "text-encoder"

    @property
    def branches(self) -> tuple[int, int]:
        """Passes of the U-Net for an image and a step: in drawing, and in learning."""
        drawing = 1 if self.guidance == 1 else 2
        return drawing, 1 if self.reuses_unconditional else drawing

    @property
    def kept_latents(self) -> int:
        """Latents of an image that are kept from drawing to learning."""
        return self.steps + 1 + (self.steps if self.reuses_unconditional else 0)

    @property
    def watched_rewards(self) -> list[str]:
        """Those of --watch that are rewards."""
        return [name for name in self.watch if name != DIVERSITY]

    @property
    def watches_diversity(self) -> bool:
        """Whether --watch names it."""
        return DIVERSITY in self.watch

    @property
    def measurements_between(self) -> int:
        """Measurements of the held-out pictures after which there is still an epoch to leave out."""
        return (self.total_epochs - 1) // self.eval_every if self.eval_every else 0

    @property
    def total_epochs(self) -> int:
        """Epochs of the whole run: --epochs, or as many as --images pays for."""
        return self.epochs if self.epochs else max(1, (self.images or 0) // self.samples_per_epoch)


FIELDS = {field.name: field for field in dataclasses.fields(TrainConfig)}
_TYPES = get_type_hints(TrainConfig)


def field_type(name: str) -> tuple[Any, bool]:
    """The type of an option and whether it may be None: `(int, True)` for `int | None`."""
    kind = _TYPES[name]
    if get_origin(kind) in (Union, types.UnionType):
        return next(arg for arg in get_args(kind) if arg is not type(None)), True
    return kind, False


def choices(name: str) -> tuple[str, ...]:
    """The values of an option that has a fixed list of them, else ()."""
    kind, _ = field_type(name)
    return get_args(kind) if get_origin(kind) is Literal else ()


@dataclass(frozen=True)
class Resolved:
    """A complete configuration with the origin of each value: flag, environment, file, preset or default."""

    config: TrainConfig
    origins: Mapping[str, str]


def resolve(flags: Mapping[str, Any], config_file: Path | None = None, *, family: Family | None = None) -> Resolved:
    """Flag > environment > file > preset > default.

    `family` (tiny or sd) is that of the resolved model; it chooses the preset where none is given. Without it, options that contradict
    each other are not looked for: the preset may mend that. A given micro-batch alone leaves an update the images of the preset's,
    rounded up.

    Raises:
        UsageError: everything that is wrong, in one message.
    """
    mistakes: list[str] = []
    values, origins = _given(flags, config_file, mistakes)
    preset = values.get("preset", "auto")
    prompts = values.get("prompts", "animals")
    if preset == "auto" and family:
        preset = automatic_preset(family, prompts)
        values["preset"], origins["preset"] = preset, "default"
    if preset != "auto" and preset not in PRESET_NAMES:
        mistakes.append(
            f"unknown preset '{preset}' ({did_you_mean(preset, PRESET_NAMES)}presets: {', '.join(PRESET_NAMES)})"
        )
    elif preset != "auto":
        settings = preset_values(preset, values.get("train", "text-encoder"), family, prompts)
        if "micro_batch" in values and "grad_accum" not in values:
            settings["grad_accum"] = -(-TrainConfig(**settings).update_batch // values["micro_batch"])
            origins["grad_accum"] = f"preset {preset}, by micro_batch"
        for name, value in settings.items():
            if (name == "images" and "epochs" in values) or (name == "epochs" and "images" in values):
                continue
            if name not in values:
                values[name] = value
                origins.setdefault(name, f"preset {preset}")
    config = TrainConfig(**values)
    if family or preset in PRESETS:
        mistakes += _contradictions(config)
    _refuse(mistakes)
    return Resolved(config, {name: origins.get(name, "default") for name in FIELDS})


def given(flags: Mapping[str, Any], config_file: Path | None = None) -> dict[str, Any]:
    """Only what the command and its file say, typed and checked, by name.

    Raises:
        UsageError: everything that is wrong, in one message.
    """
    mistakes: list[str] = []
    values, _ = _given(flags, config_file, mistakes, environment=False)
    _refuse(mistakes)
    return values


def _given(
    flags: Mapping[str, Any], config_file: Path | None, mistakes: list[str], *, environment: bool = True
) -> tuple[dict[str, Any], dict[str, str]]:
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    layers = [
        ("file", _from_file(config_file, mistakes)),
        ("environment", _from_environment() if environment else {}),
        ("flag", {name: value for name, value in flags.items() if value is not None and value != []}),
    ]
    for origin, layer in layers:
        for name, value in layer.items():
            update = 0  # images of a weaker layer's, as of a run's own file, which a micro-batch alone does not change
            if name == "micro_batch":  # auto and a number exclude each other: the stronger layer's holds
                values.pop("fit_micro_batch", None), origins.pop("fit_micro_batch", None)
                if {"micro_batch", "grad_accum"} <= values.keys() and "grad_accum" not in layer:
                    update = values["micro_batch"] * values["grad_accum"]
                if not (update and value == "auto"):
                    values.pop("micro_batch", None), origins.pop("micro_batch", None)
            if (name, value) == ("micro_batch", "auto"):
                name, value = "fit_micro_batch", True
            if (name, value) == ("timestep_batch", "auto"):
                value = 0
            converted = _convert(name, value, origin, mistakes)
            if converted is not None:
                values[name], origins[name] = converted, origin
                if update and name == "micro_batch":
                    values["grad_accum"], origins["grad_accum"] = -(-update // converted), f"{origin}, by micro_batch"
    if "epochs" in values and "images" in values and origins["epochs"] != origins["images"]:
        weaker = min(("epochs", "images"), key=lambda name: ("file", "environment", "flag").index(origins[name]))
        del values[weaker], origins[weaker]
    return values, origins


def _refuse(mistakes: Sequence[str]) -> None:
    if mistakes:
        count = f"{len(mistakes)} mistakes in the configuration: " if len(mistakes) > 1 else ""
        raise UsageError(count + "; ".join(mistakes), "see texforce train --help")


def _from_file(path: Path | None, mistakes: list[str]) -> dict[str, Any]:
    if path is None:
        return {}
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UsageError(f"there is no file '{path}'", "check --config") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
        raise UsageError(f"'{path}' is not a TOML file ({error})", "write lines such as: steps = 20") from error
    return dict(_known(values, f"in '{path}'", mistakes))


def _from_environment() -> dict[str, Any]:
    found = {key[len(ENVIRONMENT) :].lower(): value for key, value in os.environ.items() if key.startswith(ENVIRONMENT)}
    # other parts of texforce have variables of their own, so an unknown name here is no mistake
    return {
        name: [value] if field_type(name)[0] == list[str] else value for name, value in found.items() if name in FIELDS
    }


def _known(values: Mapping[str, Any], where: str, mistakes: list[str]) -> list[tuple[str, Any]]:
    known = []
    for key, value in values.items():
        name = key.replace("-", "_")
        if name in FIELDS:
            known.append((name, value))
        else:
            mistakes.append(f"unknown key '{key}' {where}: {did_you_mean(name, FIELDS)}".rstrip(": "))
    return known


def _convert(name: str, value: Any, origin: str, mistakes: list[str]) -> Any:
    """The value with its proper type, or None after noting the mistake."""
    kind, _ = field_type(name)
    flag = "--" + name.replace("_", "-")
    if choices(name):
        if value not in choices(name):
            mistakes.append(f"{flag} '{value}' ({origin}) is none of {', '.join(choices(name))}")
            return None
        return value
    if isinstance(value, str):
        value = value.removesuffix(FIELDS[name].metadata["unit"])
    try:
        converted = _typed(kind, value)
    except (TypeError, ValueError, OverflowError):
        expected = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(
            kind, "a list of text"
        )
        mistakes.append(f"{flag} '{value}' ({origin}) is not {expected}")
        return None
    check = FIELDS[name].metadata["check"]
    problem = check(converted) if check else None
    if problem:
        mistakes.append(f"{flag} {converted} ({origin}) {problem}")
        return None
    return converted


def _typed(kind: Any, value: Any) -> Any:
    if kind == list[str]:
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(item, str) for item in items):
            raise TypeError
        return list(items)
    if kind is bool:
        if isinstance(value, str) and value.lower() in ("1", "true", "yes", "0", "false", "no"):
            return value.lower() in ("1", "true", "yes")
        if isinstance(value, bool):
            return value
        raise TypeError
    if isinstance(value, bool) or (kind is str and not isinstance(value, str)):
        raise TypeError
    number = kind(value)
    if (kind is float and not math.isfinite(number)) or (kind is int and number != float(value)):
        raise ValueError
    return number


def _contradictions(config: TrainConfig) -> list[str]:
    found = []
    if config.images and config.epochs:
        found.append("--images and --epochs say the same thing twice (give one)")
    if config.samples_per_epoch % config.group_size:
        found.append(
            f"--samples-per-epoch {config.samples_per_epoch} is no multiple of --group-size {config.group_size}"
        )
    if config.images and config.images < config.samples_per_epoch:
        found.append(
            f"--images {config.images} is less than one epoch (--samples-per-epoch {config.samples_per_epoch})"
        )
    if not is_utf8(config.negative_prompt):
        found.append("--negative-prompt is no UTF-8 text")
    if config.advantages == "group" and config.group_size < 2:
        found.append("--advantages group needs --group-size 2 or more")
    if config.kl_target and config.lr_schedule != "constant":
        found.append("--kl-target steers the learning rate itself (use --lr-schedule constant)")
    if config.kl_target and config.updates_per_epoch < 2:
        found.append(
            "--kl-target needs two updates an epoch or more (--micro-batch times --grad-accum below --samples-per-epoch)"
        )
    if config.watch_patience and not config.watch:
        found.append(f"--watch-patience {config.watch_patience} needs something to --watch")
    if config.watch_patience and not config.eval_every:
        found.append(
            f"--watch-patience {config.watch_patience} counts measurements, and --eval-every 0 makes none on the way"
        )
    return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any], ignore: Sequence[str] = ()) -> list[str]:
    """The names whose values differ between two configurations, as `name (old -> new)`."""
    names = [name for name in FIELDS if name not in ignore and old.get(name) != new.get(name)]
    return [f"{name} ({old.get(name)} -> {new.get(name)})" for name in names]
