"""A training run on paper: every option resolved, nothing loaded, and what it will cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from texforce_cli.config import TrainConfig, resolve
from texforce_cli.core.train_steps import TrainSteps
from texforce_cli.devices import claim, cpu_computes_bf16, device_memory_gb, machine_memory_gb, resolve_device
from texforce_cli.diffusion.models import (
    ModelSource,
    gpu_precision,
    native_size,
    pinned,
    resolve_model,
)
from texforce_cli.errors import UsageError
from texforce_cli.files import user_path
from texforce_cli.lora.read import find_lora, read_lora
from texforce_cli.lora.spec import parse_lora
from texforce_cli.prompts import PromptSet, load_prompts
from texforce_cli.prompts.heldout import enough_to_repeat, heldout_pairs, repeated
from texforce_cli.rewards.registry import Registry, RewardInfo, load_registry
from texforce_cli.rewards.terms import find, parse_hosts, parse_terms
from texforce_cli.team import sharing
from texforce_cli.workflows.cost import computed_hours, computed_petaflop, memory_of, ways_to_save
from texforce_cli.workflows.loras import open_lora


@dataclass(frozen=True)
class Plan:
    """A run that is resolved but has loaded no weights."""

    config: TrainConfig
    origins: Mapping[str, str]
    source: ModelSource
    prompts: PromptSet
    registry: Registry
    rewards: tuple[RewardInfo, ...]

    def pinned(self) -> Plan:
        """With the commit of a model that is a branch of the Hub: the run ends with the weights that it begins with.

        Raises:
            TexforceError: neither the Hub nor the cache can tell it.
        """
        source = pinned(self.source)
        return replace(self, source=source, config=replace(self.config, model=source.reference))

    def advice(self) -> list[str]:
        """What is worth saying before a run: of its LoRA, prompts that were chosen, rewards that are strangers to drawings, memory."""
        said = self.of_this_machine()
        if self.config.init_lora:
            said += open_lora(self.config.init_lora).warnings
        if self.origins.get("prompts", "").startswith("reward "):
            said.append(
                f"prompts: '{self.config.prompts}', which go with {self.origins['prompts']}; others with --prompts"
            )
        photo = [info.name for info in self.rewards if info.domain == "photo"] if self.source.family == "tiny" else []
        if photo:
            said.append(
                f"{', '.join(photo)} was made for photographs: of the embedded model's drawings its number means little. "
                "tiny-clip, brightness and jpeg-incompressibility teach something there"
            )
        strange = [info.name for info in self.rewards if info.domain == "emoji"] if self.source.family == "sd" else []
        if strange:
            said.append(f"{', '.join(strange)} knows the drawings of the embedded model and nothing else")
        trained = {info.name for info in self.rewards}
        if own := [spec.name for spec in parse_terms(self.config.watched_rewards) if spec.name in trained]:
            said.append(
                f"--watch {own[0]}: it is trained on, so it rises where a run only games it; watch another reward"
            )
        patience, between = self.config.watch_patience, self.config.measurements_between
        if patience > between:
            every = (self.config.total_epochs - 1) // patience
            said.append(
                f"--watch-patience {patience} never ends this run: of its {self.config.total_epochs} epochs {between or 'none'} "
                f"before the last {'is' if between < 2 else 'are'} measured; give "
                + (f"--eval-every {every} or less" if every else "less of it, or more epochs")
            )
        if self.source.family == "sd" and (self.config.fit_micro_batch or not self.config.timestep_batch):
            said.append(
                "the GPU gets filled: as many images and denoising steps as fit are taken together, which --dry-run does not count; "
                "--micro-batch N and --timestep-batch N limit it"
            )
        if self.origins["fit_micro_batch"].endswith("resolved") and not self.config.fit_micro_batch:
            said.append(
                f"--micro-batch auto fills the memory of a CUDA or ROCm GPU alone: on {self.config.device} it is --micro-batch "
                f"{self.config.micro_batch}"
            )
        here = sharing(self.config.num_processes)[1]
        needed = here * self.cost().get("computed_memory_gb", 0.0) if self.config.device in ("cpu", "mps") else 0.0
        if needed and needed > (there := machine_memory_gb()):
            by = f" by {here} processes" if here > 1 else ""
            said.append(
                f"about {needed:.1f} GB of memory are needed{by} at --micro-batch {self.config.micro_batch}, and this machine has "
                f"{there:.1f}: use {ways_to_save(self.config, self.config.micro_batch)}"
            )
        return said

    def of_this_machine(self) -> list[str]:
        """What is worth saying on every machine that the run comes to."""
        if self.config.device != "cpu" or self.config.precision != "bf16" or cpu_computes_bf16():
            return []
        return [
            "torch knows of no bf16 instructions of this processor: in bf16 it may be many times as slow as in fp32"
        ]

    def cost(self) -> dict[str, float]:
        """Images and U-Net calls (one image, one branch, one step) of the whole run.

        For Stable Diffusion also what is computed from its layers, and not measured, the memory that of one process: see
        `workflows.cost`.
        """
        c = self.config
        images = c.total_epochs * c.samples_per_epoch
        drawing, learning = c.branches
        steps = TrainSteps.parse(c.train_steps)
        sampling = images * c.steps * drawing
        training = images * steps.count(c.steps) * learning * c.inner_epochs
        cost: dict[str, float] = {
            "epochs": c.total_epochs,
            "images": images,
            "updates": c.total_epochs * c.updates_per_epoch,
            "unet_calls_sampling": sampling,
            "unet_calls_training": training,
        }
        if self.source.family == "sd":
            memory = memory_of(c, c.size or native_size(self.source))
            work = computed_petaflop(images, sampling, training, memory.size)
            cost["computed_petaflop"] = work
            cost["computed_hours_at_100_tflops"] = computed_hours(work, 100)
            cost["computed_memory_gb"] = memory.gb(c.micro_batch)
        return cost


def plan(flags: Mapping[str, Any], config_file: Path | None = None) -> Plan:
    """Resolve every option, the model's name, the rewards' names and the prompts; load no weights.

    Raises:
        UsageError: everything that is wrong with the options, in one message.
    """
    first = resolve(flags, config_file)  # all mistakes before anything is looked up
    source = resolve_model(first.config.model, first.config.device)
    if not first.config.reward:
        raise UsageError("no reward was given", "add --reward jpeg-incompressibility, or another of: texforce rewards")
    registry = load_registry()
    trained, watched, options = first.config.reward, first.config.watched_rewards, first.config.reward_option
    terms = parse_terms(trained, options, beside=watched)
    parse_hosts(first.config.reward_host, terms)
    infos = [find(spec, registry) for spec in terms]
    for spec in parse_terms(watched, options, beside=trained):
        find(spec, registry)
    if first.config.watch and not first.config.eval_images:
        raise UsageError("--watch measures held-out pictures, and --eval-images is 0", "leave one of them out")
    wanting = [info for info in infos if info.prompts] if first.origins["prompts"] == "default" else []
    if wanting:
        flags = {**flags, "prompts": wanting[0].prompts}
    resolved = resolve(flags, config_file, family=source.family)
    config, origins = resolved.config, dict(resolved.origins)
    if wanting:
        origins["prompts"] = f"reward {wanting[0].name}"
    prompts = load_prompts(config.prompts, source.family)
    if config.watches_diversity and len(repeated(heldout_pairs(prompts, config.eval_images)[0])) < 2:
        enough = enough_to_repeat(prompts, 2)
        raise UsageError(
            f"--watch diversity compares pictures of the same prompt, for two prompts or more, and the {config.eval_images} "
            "held-out ones are not enough for it",
            f"give --eval-images {enough}" if enough else "give two prompts or more",
        )
    chosen = _chosen(config, origins, source)
    for name, value in chosen.items():
        if getattr(config, name) != value:
            origins[name] = f"{origins[name]}, resolved"
            config = replace(config, **{name: value})
    return Plan(config, origins, source, prompts, registry, tuple(infos))


def _chosen(config: TrainConfig, origins: Mapping[str, str], source: ModelSource) -> dict[str, Any]:
    """The values that are chosen for this machine, once, and recorded."""
    device = resolve_device(config.device)
    claim(str(device))
    chosen: dict[str, Any] = {
        "model": source.reference,
        "device": str(device),
        "alpha": config.alpha or float(config.rank),
        "eval_steps": config.eval_steps or config.steps,
    }
    if config.init_lora:
        spec = parse_lora(config.init_lora)
        read_lora(spec.source)  # what cannot be begun with is told now, not when the model is loaded
        chosen["init_lora"] = str(replace(spec, source=_absolute(spec.source)))
    if device.type != "cuda":  # the memory is the machine's own, which swaps before it is full
        chosen["fit_micro_batch"] = False
        chosen["timestep_batch"] = config.timestep_batch or 1
    if origins["precision"] == "preset fast" and not (device.type == "cpu" and cpu_computes_bf16()):
        chosen["precision"] = "fp32"
    if source.family == "sd":
        memory = device_memory_gb(device)
        if memory is not None and origins["precision"] == "default":
            chosen["precision"] = gpu_precision()
        if origins["micro_batch"] == "default":
            made = replace(config, precision=chosen.get("precision", config.precision))
            room = memory or machine_memory_gb() / sharing(config.num_processes)[1]  # a GPU is nobody else's
            fits = memory_of(made, config.size or native_size(source)).micro_batch(room)
            chosen["micro_batch"] = fits
            chosen["grad_accum"] = config.update_batch // fits
            chosen["fit_micro_batch"] = memory is not None
    return chosen


def _absolute(source: str) -> str:
    """The file of a LoRA, or its folder where it is made of several, from any folder."""
    files = find_lora(source)
    return str(files[0].absolute() if len(files) == 1 else user_path(source).absolute())
