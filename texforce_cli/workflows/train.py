"""`texforce train`: resolve, load, preflight, then epochs with checkpoints until the budget is spent."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from texforce_cli.algorithms.base import EpochReport, Phase
from texforce_cli.config import TrainConfig, differences, resolve
from texforce_cli.diffusion.models import fingerprint, load_pipeline, resolve_model
from texforce_cli.errors import Interrupted, TexforceError, UsageError
from texforce_cli.files import write_text
from texforce_cli.prompts import read_prompts
from texforce_cli.report.curve import reward_curve
from texforce_cli.rewards.terms import RewardSet
from texforce_cli.workflows import checkpoint as checkpoints
from texforce_cli.workflows import model_card
from texforce_cli.workflows.assembly import make_adapter, make_algorithm, make_optimisation, make_policy, make_rewards
from texforce_cli.workflows.checkpoint import Checkpoint
from texforce_cli.workflows.events import (
    Checked,
    EpochDone,
    Evaluated,
    Evaluation,
    Listener,
    Note,
    Progressed,
    Started,
    Warned,
    silent,
)
from texforce_cli.workflows.heldout import HeldOut
from texforce_cli.workflows.loggers import open_logger
from texforce_cli.workflows.plan import Plan, plan
from texforce_cli.workflows.run_folder import RunFolder, read_rows, versions, write_rows
from texforce_cli.workflows.stopping import StopRequest

FLAT_EPOCHS = 3
"""So many epochs in a row whose rewards do not vary end a run."""
PICTURES = 8
"""Pairs shown in samples/epoch_NNNN.png."""


@dataclass(frozen=True)
class TrainResult:
    """A finished run."""

    folder: Path
    adapter: Path
    epochs: int
    images: int
    seconds: float
    evaluation: Evaluation | None


def train(flags: Mapping[str, Any], *, config_file: Path | None = None, listener: Listener = silent) -> TrainResult:
    """Begin a run and see it through.

    Raises:
        UsageError, TexforceError: a mistake of the user or a fault of the machine; finished epochs are saved.
        Interrupted: Ctrl-C or SIGTERM.
    """
    made = plan(flags, config_file)
    listener(Note(f"model: {made.source.name} ({made.source.reason}), on {made.config.device}"))
    rewards = make_rewards(made.config)
    folder = RunFolder.create(made.config.out, str(made.config.reward[0]).partition(":")[0], made.source.short_name)
    config = replace(made.config, out=str(folder.path))
    try:
        run = TrainingRun(folder, replace(made, config=config), rewards, listener)
    except BaseException:
        folder.remove_if_empty()  # nothing has begun: a second try finds the same name free
        raise
    write_text(folder.prompts, made.prompts.to_jsonl())
    run.write_record(status="running")
    return run.run()


def resume(
    path: str, flags: Mapping[str, Any], *, config_file: Path | None = None, listener: Listener = silent
) -> TrainResult:
    """Continue a run from its last whole checkpoint, to the same bits as if it had not stopped (on a CPU).

    Raises:
        UsageError: no run there, or options that differ from those of the run.
    """
    folder = RunFolder.open(path)
    record = folder.read_record()
    recorded = record["config"]
    given = {name: value for name, value in flags.items() if value not in (None, [])}
    if given or config_file:
        wanted = dataclasses.asdict(resolve(given, config_file).config)
        named = set(given) | set(resolve({}, config_file).origins if config_file else ())
        changed = differences(recorded, {**recorded, **{name: wanted[name] for name in named}}, ignore=("out",))
        if changed:
            raise UsageError(
                f"'{path}' was begun with other options: {', '.join(changed)}",
                "resume without them, or begin a new run with --config " + str(folder.path / "config.toml"),
            )
    config = TrainConfig(**recorded)
    source = replace(resolve_model(config.model), reason=record["model"]["reason"])
    prompts = replace(read_prompts(folder.prompts), **{key: record["prompts"][key] for key in ("name", "source")})
    run = TrainingRun(folder, Plan(config, record["origins"], source, prompts), make_rewards(config), listener)
    run.restore()
    return run.run()


class TrainingRun:
    """One run: owns the folder, the checkpoints, the pictures and the signals; the algorithm owns an epoch."""

    def __init__(self, folder: RunFolder, made: Plan, rewards: RewardSet, listener: Listener) -> None:
        self.folder, self.plan, self.config = folder, made, made.config
        self.rewards, self.listener = rewards, listener
        self.stop = StopRequest()
        config = self.config
        pipeline = load_pipeline(made.source, device=torch.device(config.device), precision=config.precision)
        if made.source.family == "sd":
            listener(Note("the safety checker is off while training"))
        self.adapter = make_adapter(pipeline, config)
        self.policy = make_policy(pipeline, config, self.adapter)
        self.optimisation = make_optimisation(config, self.adapter)
        self.algorithm = make_algorithm(
            config, self.policy, rewards, self.optimisation, made.prompts.seen, self._progress
        )
        self.heldout = HeldOut(made.prompts, config.eval_images, self.policy, self.rewards, batch=config.micro_batch)
        self.rows: list[dict[str, Any]] = []
        self.evaluations: list[Evaluation] = []
        self.epoch, self.flat_epochs = 0, 0
        self.best: tuple[float, int] | None = None

    def run(self) -> TrainResult:
        """Epochs until the budget is spent, the user stops it, or it cannot learn."""
        begun = time.perf_counter()
        total = self.config.total_epochs
        self._warn_of_long_prompts()
        self.listener(
            Started(
                self.folder.path,
                dataclasses.asdict(self.config),
                self.plan.origins,
                total,
                self.epoch,
                total * self.config.samples_per_epoch,
            )
        )
        logger = open_logger(self.config.log, self.folder.path, dataclasses.asdict(self.config))
        with self.stop.listening():
            try:
                self._check_preflight()
                self.heldout.measure_base(lambda done, n: self._progress("evaluation", done, n))
                while self.epoch < total:
                    row = self._epoch()
                    logger.log(row)
            except Interrupted as stop:
                self.write_record(status="interrupted")
                command = f"texforce train --resume {self.folder.path}"
                text = f"stopped; {self.epoch} of {total} epochs are saved in '{self.folder.path}'"
                raise Interrupted(text, f"go on with: {command}", exit_code=stop.exit_code) from None
            except TexforceError as error:
                self.write_record(status="failed", reason=str(error))
                raise
            finally:
                logger.close()
                self.rewards.close()
        self._save_before_after()
        self.write_record(status="finished")
        return TrainResult(
            self.folder.path,
            self.folder.adapter,
            self.epoch,
            self.epoch * self.config.samples_per_epoch,
            time.perf_counter() - begun,
            self.evaluations[-1] if self.evaluations else None,
        )

    def restore(self) -> None:
        """Take up the newest whole checkpoint; without one, begin again."""
        found, damaged = checkpoints.load_latest(self.folder.checkpoints)
        for sentence in damaged:
            self.listener(Warned(sentence))
        if found is None:
            self.listener(Warned("there is no whole checkpoint: beginning again"))
            return
        numbers = found.numbers
        self.adapter.load_state_dict({k[5:]: v for k, v in found.tensors.items() if k.startswith("lora.")})
        self.optimisation.load(found.tensors, numbers["optimisation"])
        self.algorithm.load_state_dict(numbers["algorithm"])
        self.epoch, self.flat_epochs = found.epoch, numbers["flat_epochs"]
        self.best = tuple(numbers["best"]) if numbers["best"] else None
        checkpoints.remove_after(self.folder.checkpoints, self.epoch)
        self.rows = [row for row in read_rows(self.folder.metrics) if row["epoch"] <= self.epoch]
        self.heldout.restore(
            evaluation for evaluation in read_rows(self.folder.evaluations) if evaluation["epoch"] <= self.epoch
        )
        self.evaluations = list(self.heldout.history)

    def write_record(self, status: str, reason: str | None = None) -> None:
        """run.json as things stand."""
        self.folder.write_record(
            {
                "texforce_run": 1,
                "status": status,
                **({"reason": reason} if reason else {}),
                "epochs_done": self.epoch,
                "best_epoch": self.best[1] if self.best else None,
                "config": dataclasses.asdict(self.config),
                "origins": dict(self.plan.origins),
                "model": {
                    "name": self.plan.source.name,
                    "kind": self.plan.source.kind,
                    "location": self.plan.source.location if self.plan.source.kind == "hub" else self.plan.source.name,
                    "reason": self.plan.source.reason,
                    **fingerprint(self.plan.source),
                },
                "prompts": {
                    "name": self.plan.prompts.name,
                    "source": self.plan.prompts.source,
                    "sha256": self.plan.prompts.sha256,
                    "seen": [prompt.text for prompt in self.plan.prompts.seen],
                    "unseen": [prompt.text for prompt in self.plan.prompts.unseen],
                },
                "versions": versions(),
            }
        )

    def _warn_of_long_prompts(self) -> None:
        for prompt in (*self.plan.prompts.seen, *self.plan.prompts.unseen):
            cut = self.policy.too_long(prompt.text)
            if cut:
                text = f"{cut} tokens of the prompt '{prompt.text[:60]}' are beyond the limit and are not seen"
                self.listener(Warned(text))

    def _check_preflight(self) -> None:
        result = self.algorithm.preflight()
        self.listener(Checked(result))
        if not result.ok:
            raise TexforceError(
                f"with unchanged weights the ratio differs from 1 by {result.ratio_error:.1e}, above a tenth of the clip "
                f"range ({result.limit:.1e})",
                "use --precision fp32, or a larger --clip-range",
            )

    def _epoch(self) -> dict[str, Any]:
        report = self.algorithm.run_epoch(self.epoch)
        for text in report.warnings:
            self.listener(Warned(f"epoch {self.epoch + 1}: {text}"))
        self.flat_epochs = self.flat_epochs + 1 if report.flat else 0
        self.epoch += 1
        row = self._row(report)
        self.rows.append(row)
        live = self._state()
        with self.optimisation.averaged():
            if self._evaluates():
                self._evaluate()
            self._remember_best(report)
            self._save(live)
        self.listener(EpochDone(report, row["images"]))
        if self.flat_epochs >= FLAT_EPOCHS:
            raise TexforceError(
                f"the rewards did not vary in {FLAT_EPOCHS} epochs in a row",
                "the reward cannot tell these pictures apart: change --reward, --prompts or --guidance",
            )
        return row

    def _row(self, report: EpochReport) -> dict[str, Any]:
        seconds = dict(report.seconds)
        total = sum(seconds.values())
        row = {
            "epoch": self.epoch,
            "images": self.epoch * self.config.samples_per_epoch,
            **{
                name: getattr(report, name)
                for name in (
                    "reward_mean",
                    "reward_std",
                    "terms",
                    "approx_kl",
                    "clip_fraction",
                    "ratio_error",
                    "grad_norm",
                    "learning_rate",
                    "reference_kl",
                )
            },
            **{f"seconds_{phase}": round(value, 3) for phase, value in seconds.items()},
            "seconds_total": round(total, 3),
            "images_per_second": round(report.images / total, 2) if total else None,
        }
        return row

    def _evaluates(self) -> bool:
        every = self.config.eval_every
        return bool(self.heldout) and (
            self.epoch == self.config.total_epochs or bool(every and self.epoch % every == 0)
        )

    def _evaluate(self) -> None:
        images = self.epoch * self.config.samples_per_epoch
        evaluation = self.heldout.measure(self.epoch, images, lambda done, n: self._progress("evaluation", done, n))
        self.evaluations.append(evaluation)
        self.heldout.save_pictures(
            self.folder.samples / f"epoch_{self.epoch:04d}.png", PICTURES, f"{self.rewards} after {images} images"
        )
        self.listener(Evaluated(evaluation))

    def _save_before_after(self) -> None:
        if self.evaluations:
            last = self.evaluations[-1]
            unit = f" {self.rewards.unit}" if self.rewards.unit else ""
            self.heldout.save_pictures(
                self.folder.before_after,
                PICTURES,
                f"{self.rewards}: same prompts, same noise",
                before_label=f"base: {last.base_mean:.2f}{unit} a picture",
                after_label=f"after {last.images} images: {last.mean:.2f}{unit} a picture",
            )

    def _remember_best(self, report: EpochReport) -> None:
        """By the held-out reward where it is measured, else by the epoch's own."""
        if self.heldout:
            value = self.evaluations[-1].mean if self.evaluations and self.evaluations[-1].epoch == self.epoch else None
        else:
            value = report.reward_mean
        if value is not None and (self.best is None or value > self.best[0]):
            self.best = (value, self.epoch)

    def _state(self) -> dict[str, torch.Tensor]:
        """The exact parameters as they are trained (not their average) and the optimiser's moments."""
        lora = {f"lora.{name}": value for name, value in self.adapter.state_dict().items()}
        return lora | self.optimisation.tensors()

    def _save(self, state: Mapping[str, torch.Tensor]) -> None:
        """Everything that the finished epoch leaves behind; the checkpoint last, so that it implies the rest."""
        write_rows(self.folder.metrics, self.rows)
        write_rows(self.folder.evaluations, [dataclasses.asdict(evaluation) for evaluation in self.evaluations])
        label = f"{self.rewards}" + (f" ({self.rewards.unit})" if self.rewards.unit else "")
        reward_curve(
            self.rows,
            self.folder.curve,
            title=f"{self.plan.source.short_name}, {self.config.train}",
            reward_label=label,
            evaluations=[_curve_point(evaluation) for evaluation in self.evaluations],
        )
        lora = model_card.write_adapter(
            self.folder.adapter, self.adapter.export(), self.plan, self.rows[-1], self.evaluations
        )
        numbers = {
            "optimisation": self.optimisation.numbers(),
            "algorithm": self.algorithm.state_dict(),
            "flat_epochs": self.flat_epochs,
            "best": self.best,
        }
        checkpoints.save(self.folder.checkpoints, Checkpoint(self.epoch, state, numbers), lora)
        checkpoints.prune(
            self.folder.checkpoints,
            keep=self.config.keep,
            every=self.config.save_every,
            best=self.best[1] if self.best else None,
        )
        self.write_record(status="running")

    def _progress(self, phase: Phase | str, done: int, total: int) -> None:
        self.listener(Progressed(phase, done, total))
        self.stop.check()


def _curve_point(evaluation: Evaluation) -> dict[str, float]:
    half = evaluation.difference.half_width
    return {
        "images": evaluation.images,
        "mean": evaluation.mean,
        "base": evaluation.base_mean,
        "low": evaluation.mean - half,
        "high": evaluation.mean + half,
    }
