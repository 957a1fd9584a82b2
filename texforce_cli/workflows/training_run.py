"""A training run: epochs with checkpoints and measurements until the budget is spent."""

from __future__ import annotations

import dataclasses
import os
import shlex
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from texforce_cli.algorithms.base import EpochReport, Phase, Preflight
from texforce_cli.diffusion.models import fingerprint, load_pipeline
from texforce_cli.errors import Interrupted, TexforceError
from texforce_cli.report.curve import reward_curve
from texforce_cli.rewards.terms import RewardSet
from texforce_cli.workflows import checkpoint as checkpoints
from texforce_cli.workflows import model_card
from texforce_cli.workflows.assembly import (
    make_adapter,
    make_algorithm,
    make_optimisation,
    make_policy,
    make_watches,
)
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
)
from texforce_cli.workflows.heldout import HeldOut
from texforce_cli.workflows.loggers import open_logger
from texforce_cli.workflows.plan import Plan
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


class TrainingRun:
    """One run: owns the folder, the checkpoints, the pictures and the signals; the algorithm owns an epoch."""

    def __init__(
        self,
        folder: RunFolder,
        made: Plan,
        rewards: RewardSet,
        listener: Listener,
        *,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.folder, self.plan, self.config = folder, made, made.config
        self.rewards, self.listener = rewards, listener
        self.stop = StopRequest()
        config = self.config
        device = torch.device(config.device)
        if device.type == "cuda":  # the same command, the same bits, as far as CUDA has deterministic kernels
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True, warn_only=True)
        pipeline = load_pipeline(made.source, device=device, precision=config.precision)
        if made.source.family == "sd":
            listener(Note("the safety checker is off while training"))
        self.adapter = make_adapter(pipeline, config, begin=checkpoint is None)
        self.policy = make_policy(pipeline, config, self.adapter)
        self.optimisation = make_optimisation(config, self.adapter)
        self.algorithm = make_algorithm(
            config, self.policy, rewards, self.optimisation, made.prompts.seen, self._progress
        )
        self.heldout = HeldOut(
            made.prompts,
            config.eval_images,
            self.policy,
            self.rewards,
            batch=config.micro_batch,
            watch=make_watches(config, made.registry),
        )
        self.rows: list[dict[str, Any]] = []
        self.epoch, self.flat_epochs = 0, 0
        self.preflight: Preflight | None = None
        if checkpoint is not None:
            self._restore(checkpoint)

    def run(self) -> TrainResult:
        """Epochs until the budget is spent, the user stops it, or it cannot learn.

        Raises:
            TexforceError: another process trains in this folder; the reward fails; the disk is full.
            Interrupted: asked to stop.
        """
        begun = time.perf_counter()
        total = self.config.total_epochs
        self.write_record(status="running")
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
        try:
            with self.stop.listening():
                self._train()
        except Interrupted as stop:
            self.write_record(status="interrupted")
            text = f"stopped; {self.epoch} of {total} epochs are saved in '{self.folder.path}'"
            command = f"texforce train --resume {shlex.quote(str(self.folder.path))}"
            raise Interrupted(text, f"go on with: {command}", exit_code=stop.exit_code) from None
        except TexforceError as error:
            self.write_record(status="failed", reason=str(error))
            raise
        except torch.OutOfMemoryError as error:
            self.write_record(status="failed", reason="out of memory")
            raise TexforceError(
                f"the memory of {self.config.device} is full (--micro-batch {self.config.micro_batch})",
                "use a smaller --micro-batch with a larger --grad-accum, or --gradient-checkpointing",
            ) from error
        except BaseException as error:
            self.write_record(status="failed", reason=type(error).__name__)
            raise
        finally:
            self.rewards.close()
            self.heldout.close()
        self._save_before_after()
        self.write_record(status="finished", reason=self._ended_early())
        return TrainResult(
            self.folder.path,
            self.folder.adapter,
            self.epoch,
            self.epoch * self.config.samples_per_epoch,
            time.perf_counter() - begun,
            self.heldout.history[-1] if self.heldout.history else None,
        )

    def _train(self) -> None:
        logger = open_logger(self.config.log, self.folder.path, dataclasses.asdict(self.config))
        try:
            self._check_preflight()
            self.heldout.measure_base(lambda done, n: self._progress("evaluation", done, n))
            with self.optimisation.averaged():
                self._conclude()  # what an interruption after the last checkpoint has left out
            while self.epoch < self.config.total_epochs and not self._ended_early():
                logger.log(self._epoch())
            if reason := self._ended_early():
                self.listener(Warned(f"{reason}; the best epoch by it is {self.best_epoch}"))
        finally:
            logger.close()

    def _restore(self, found: Checkpoint) -> None:
        numbers = found.numbers
        self.adapter.load_state_dict({k[5:]: v for k, v in found.tensors.items() if k.startswith("lora.")})
        self.optimisation.load(found.tensors, numbers["optimisation"])
        self.algorithm.load_state_dict(numbers["algorithm"])
        self.epoch, self.flat_epochs = found.epoch, numbers["flat_epochs"]
        checkpoints.remove_after(self.folder.checkpoints, self.epoch)
        self.rows = [row for row in read_rows(self.folder.metrics) if row["epoch"] <= self.epoch]
        self.heldout.restore(row for row in read_rows(self.folder.evaluations) if row["epoch"] <= self.epoch)

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the highest held-out value of the first --watch, else of the reward, else of its own images."""
        history, watched = self.heldout.history, next(iter(self.heldout.watch), "")
        values = {e.epoch: e.watched[watched].mean if watched else e.mean for e in history}
        values = values or {row["epoch"]: row["reward_mean"] for row in self.rows}
        return max(values, key=lambda epoch: values[epoch]) if values else None

    def write_record(self, status: str, reason: str | None = None) -> None:
        """run.json as things stand."""
        self.folder.write_record(
            {
                "texforce_run": 1,
                "status": status,
                **({"reason": reason} if reason else {}),
                "epochs_done": self.epoch,
                "best_epoch": self.best_epoch,
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
                    "seen": len(self.plan.prompts.seen),
                    "unseen": len(self.plan.prompts.unseen),
                },
                "preflight": dataclasses.asdict(self.preflight) if self.preflight else None,
                "versions": versions(),
            }
        )

    def _warn_of_long_prompts(self) -> None:
        prompts = [prompt.text for prompt in (*self.plan.prompts.seen, *self.plan.prompts.unseen)]
        cut = [(text, tokens) for text in prompts if (tokens := self.policy.too_long(text))]
        for text, tokens in cut[:3]:
            self.listener(Warned(f"{tokens} tokens of the prompt '{text[:60]}' are beyond the limit and are not seen"))
        if len(cut) > 3:
            self.listener(Warned(f"so are some of {len(cut) - 3} more prompts"))

    def _check_preflight(self) -> None:
        result = self.preflight = self.algorithm.preflight()
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
        row = self._row(report)
        state = self._state()
        with self.optimisation.averaged():
            self._save(row, state)
            self._conclude()
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
        memory = {name: round(number / 1e6) for name, number in self.rewards.memory().items()}
        row = {
            "epoch": report.epoch + 1,
            "images": (report.epoch + 1) * self.config.samples_per_epoch,
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
            **({"skipped_updates": report.skipped_updates} if report.skipped_updates else {}),
            **({"reward_counts": dict(report.counts)} if report.counts else {}),
            **({"reward_memory_mb": memory} if memory else {}),
            **{f"seconds_{phase}": round(value, 3) for phase, value in seconds.items()},
            "seconds_total": round(total, 3),
            "images_per_second": round(report.images / total, 2) if total else None,
        }
        return row

    def _save(self, row: dict[str, Any], state: Mapping[str, torch.Tensor]) -> None:
        """The finished epoch on disk; from here on nothing of it can be lost."""
        write_rows(self.folder.metrics, [*self.rows, row])
        numbers = {
            "optimisation": self.optimisation.numbers(),
            "algorithm": self.algorithm.state_dict(),
            "flat_epochs": self.flat_epochs,
        }
        lora = model_card.adapter_bytes(self.adapter.export(), self.plan, row["images"])
        checkpoints.save(self.folder.checkpoints, Checkpoint(row["epoch"], state, numbers), lora)
        self.epoch = row["epoch"]
        self.rows.append(row)

    def _conclude(self) -> None:
        """Measure the epoch where that is due, and write what people look at."""
        if not self.rows:
            return
        if self._evaluation_is_due():
            images = self.rows[-1]["images"]
            evaluation = self.heldout.measure(self.epoch, images, lambda done, n: self._progress("evaluation", done, n))
            write_rows(self.folder.evaluations, [dataclasses.asdict(e) for e in self.heldout.history])
            self.heldout.save_pictures(
                self.folder.samples / f"epoch_{self.epoch:04d}.png", PICTURES, f"{self.rewards} after {images} images"
            )
            self.listener(Evaluated(evaluation))
        evaluations = self.heldout.history
        reward_curve(
            self.rows,
            self.folder.curve,
            title=f"{self.plan.source.short_name}, {self.config.train}",
            reward_label=f"{self.rewards}" + (f" ({self.rewards.unit})" if self.rewards.unit else ""),
            evaluations=[_curve_point(evaluation) for evaluation in evaluations],
            watched={name: [_watched_point(e, name) for e in evaluations] for name in self.heldout.watch},
        )
        lora = model_card.adapter_bytes(self.adapter.export(), self.plan, self.rows[-1]["images"])
        model_card.write_adapter(self.folder.adapter, lora, self.plan, self.rows[-1], evaluations)
        checkpoints.prune(
            self.folder.checkpoints, keep=self.config.keep, every=self.config.save_every, best=self.best_epoch
        )
        self.write_record(status="running")

    def _ended_early(self) -> str | None:
        """Why the run ends before its budget is spent."""
        if self.epoch >= self.config.total_epochs:
            return None
        patience = self.config.watch_patience
        name = self.heldout.fallen(patience)
        return f"{name} was surely below the base in {patience} measurements in a row" if name else None

    def _evaluation_is_due(self) -> bool:
        every = self.config.eval_every
        due = self.epoch == self.config.total_epochs or bool(every and self.epoch % every == 0)
        done = bool(self.heldout.history) and self.heldout.history[-1].epoch == self.epoch
        return bool(self.heldout) and due and not done

    def _save_before_after(self) -> None:
        if self.heldout.history:
            last = self.heldout.history[-1]
            unit = f" {self.rewards.unit}" if self.rewards.unit else ""
            self.heldout.save_pictures(
                self.folder.before_after,
                PICTURES,
                f"{self.rewards}: same prompts, same noise",
                before_label=f"base: {last.base_mean:.2f}{unit} a picture",
                after_label=f"after {last.images} images: {last.mean:.2f}{unit} a picture",
            )

    def _state(self) -> dict[str, torch.Tensor]:
        """The exact parameters as they are trained (not their average) and the optimiser's moments."""
        lora = {f"lora.{name}": value for name, value in self.adapter.state_dict().items()}
        return lora | self.optimisation.tensors()

    def _progress(self, phase: Phase | str, done: int, total: int, *, reward: float | None = None) -> None:
        self.listener(Progressed(phase, done, total, reward))
        self.stop.check()


def _watched_point(evaluation: Evaluation, name: str) -> dict[str, float]:
    change = evaluation.watched[name].difference
    return {"images": evaluation.images, "mean": change.mean, "low": change.low, "high": change.high}


def _curve_point(evaluation: Evaluation) -> dict[str, float]:
    half = evaluation.difference.half_width
    return {
        "images": evaluation.images,
        "mean": evaluation.mean,
        "base": evaluation.base_mean,
        "low": evaluation.mean - half,
        "high": evaluation.mean + half,
    }
