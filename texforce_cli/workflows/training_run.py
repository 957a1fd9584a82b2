"""A training run: epochs with checkpoints and measurements until the budget is spent."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from texforce_cli.algorithms.base import EpochReport, Phase, Preflight
from texforce_cli.config import DIVERSITY
from texforce_cli.diffusion.models import fingerprint
from texforce_cli.errors import Interrupted, TexforceError, Unsuited, first_line, quoted
from texforce_cli.files import NotWritten, write_text
from texforce_cli.report.curve import reward_curve
from texforce_cli.team import Team
from texforce_cli.workflows import checkpoint as checkpoints
from texforce_cli.workflows import model_card
from texforce_cli.workflows.assembly import Scoring
from texforce_cli.workflows.checkpoint import Checkpoint
from texforce_cli.workflows.drafts import Drafts
from texforce_cli.workflows.drawing import too_long
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
from texforce_cli.workflows.learner import Learner, memory_full
from texforce_cli.workflows.loggers import open_logger
from texforce_cli.workflows.plan import Plan
from texforce_cli.workflows.run_folder import RunFolder, made_with, read_rows, versions_of, write_rows
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
    best: Path | None
    """The checkpoint of the best epoch, where a run that ended early went on to worse ones."""
    model: str | None
    """What `--model` has to be given to draw with the adapter, where its header is not enough."""
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
        scoring: Scoring,
        listener: Listener,
        *,
        team: Team,
        checkpoint: Checkpoint | None = None,
    ) -> None:
        self.folder, self.plan, self.config = folder, made, made.config
        self.rewards, self.listener, self.team = scoring.rewards, listener, team
        record = {} if checkpoint is None else folder.read_record()
        self._versions = versions_of(record, {**made_with(), **scoring.made_from})
        self.stop = StopRequest(self.config.save_within)
        team.shield, team.heed = self.stop.shielded, self.stop.heed
        self._begun, self._saving = 0.0, 0.0
        """When the epoch under way began, and the seconds that saving the last one took."""
        self.drafts = Drafts(folder, self.config.draft_every, self.config.device, compiled=self.config.compile)
        self.learner = Learner(
            self.config,
            made.prompts,
            scoring,
            team=team,
            progress=self._progress,
            begin=checkpoint is None,
            warn=self._warn,
            drafts=self.drafts,
        )
        self.heldout = self.learner.heldout
        if made.source.family == "sd":
            listener(Note("the safety checker is off while training"))
        self.rows: list[dict[str, Any]] = []
        self.epoch, self.flat_epochs = 0, 0
        self.preflight: Preflight | None = None
        if checkpoint is not None:
            self._restore(checkpoint)
        elif team.size > 1:  # the others begin with the weights of this process
            self.learner.restore(self.learner.tensors(), self.learner.numbers())

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
            self.write_record(status="finished", reason=self._ended_early())
        except Interrupted as stop:
            if lost := self._lost():
                raise Interrupted(f"stopped; {lost}", "begin again", exit_code=stop.exit_code) from None
            self._record_end("interrupted")
            drawn, others = self.drafts.count(), self.team.size > 1  # which may still be writing theirs
            more = f" and {'at least ' if others else ''}{drawn} images of the next" if drawn else ""
            text = f"stopped; {self.epoch} of {total} epochs{more} are saved in '{self.folder.path}'"
            raise Interrupted(text, f"go on with: {self._resuming}", exit_code=stop.exit_code) from None
        except NotWritten as error:  # "run the command again" would begin another run
            self._record_end("failed", reason=error.message)
            raise TexforceError(error.message, f"when that is mended, go on with: {self._resuming}") from error
        except Unsuited as error:
            anew = self.folder.anew(error)
            self._record_end("failed", reason=str(anew))
            raise anew from error
        except TexforceError as error:
            self._record_end("failed", reason=str(error))
            raise
        except torch.OutOfMemoryError as error:
            self._record_end("failed", reason="out of memory")
            raise self.folder.anew(memory_full(self.config, error)) from error
        except BaseException as error:
            self._record_end("failed", reason=type(error).__name__)
            raise
        result = TrainResult(
            self.folder.path,
            self.folder.adapter,
            self._better_than_last(),
            None if self.plan.source.published else self.plan.source.reference,
            self.epoch,
            self.epoch * self.config.samples_per_epoch,
            time.perf_counter() - begun,
            self.heldout.history[-1] if self.heldout.history else None,
        )
        self.learner.end(result)
        return result

    @property
    def _resuming(self) -> str:
        return f"texforce train --resume {quoted(self.folder.path)}"

    def _lost(self) -> str:
        """What has become of the folder, where this run is not in it any more."""
        if not os.path.lexists(self.folder.prompts):
            return f"'{self.folder.path}' was removed, with all that was saved in it"
        return f"'{self.folder.path}' was removed, and another run works there now" if self._is_of_another() else ""

    def _is_of_another(self) -> bool:
        return self.folder.run_id() not in (None, self.folder.id)

    def _refuse_another(self) -> None:
        """Raise where another run would be written over."""
        if self._is_of_another():
            raise TexforceError(self._lost(), "begin again, with another --out")

    def _record_end(self, status: str, reason: str | None = None) -> None:
        """run.json where it can be written: a full disk must not hide why the run ends."""
        with contextlib.suppress(TexforceError):
            self.write_record(status, reason)

    def _train(self) -> None:
        logger = open_logger(self.config.log, self.folder.path, dataclasses.asdict(self.config), self._warn)
        try:
            self._check_preflight()
            self.learner.measure_base()
            with self.learner.optimisation.averaged():
                self._conclude()  # what an interruption after the last checkpoint has left out
            while self.epoch < self.config.total_epochs and not self._ended_early():
                logger.log(self._epoch())
                self.stop.check()
            if reason := self._ended_early():
                by = self._judge or f"the reward, {self.rewards},"
                self.listener(Warned(f"{reason}; the best epoch by {by} is {self.best_epoch}"))
            self._save_before_after()
        finally:
            logger.close()

    def _restore(self, found: Checkpoint) -> None:
        self.learner.restore(found.tensors, found.numbers)
        self.epoch, self.flat_epochs = found.epoch, found.numbers["flat_epochs"]
        checkpoints.remove_after(self.folder.checkpoints, self.epoch)
        self.drafts.clear(but=self.epoch)
        rows, measured = (read_rows(path, self._warn) for path in (self.folder.metrics, self.folder.evaluations))
        self.rows = [row for row in rows if row["epoch"] <= self.epoch]
        self.heldout.restore(row for row in measured if row["epoch"] <= self.epoch)

    @property
    def _judge(self) -> str:
        """The first watched reward; "" where there is none: pictures that differ more are not better ones."""
        return next((name for name in self.heldout.watched if name != DIVERSITY), "")

    @property
    def best_epoch(self) -> int | None:
        """The epoch with the highest held-out value of the first watched reward, else of the reward, else with the best images:
        those of the next one, which draws by its weights."""
        history = self.heldout.history
        judge = self._judge
        values = {e.epoch: e.watched[judge].mean if judge else e.mean for e in history}
        values = values or {row["epoch"] - 1: row["reward_mean"] for row in self.rows if row["epoch"] > 1}
        return max(values, key=lambda epoch: values[epoch]) if values else None

    def write_record(self, status: str, reason: str | None = None) -> None:
        """run.json as things stand."""
        self._refuse_another()
        self.folder.write_record(
            {
                "texforce_run": 1,
                "id": self.folder.id,
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
                "processes": self.team.size,
                **self._versions,
            }
        )

    def _warn_of_long_prompts(self) -> None:
        prompts = (prompt.text for prompt in (*self.plan.prompts.seen, *self.plan.prompts.unseen))
        for sentence in too_long(self.learner.policy, prompts):
            self.listener(Warned(sentence))

    def _check_preflight(self) -> None:
        uncompiled = f"go on with: {self._resuming} --no-compile"
        try:
            result = self.preflight = self.learner.preflight()
        except RuntimeError as error:
            if not type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
                raise
            reason = first_line(getattr(error, "inner_exception", error))  # the outer one only names the backend
            raise TexforceError(f"torch.compile does not work here ({reason})", uncompiled) from error
        self.listener(Checked(result))
        if not result.gradient_ok:
            raise TexforceError(
                f"torch.compile makes the gradient of this model wrong by {result.gradient_error:.0%} "
                f"(torch {torch.__version__} on {self.learner.policy.device.type})",
                uncompiled,
            )
        if not result.ratio_ok:
            sentence = (
                f"with unchanged weights the ratio differs from 1 by {result.ratio_error:.1e}, above a tenth of the clip "
                f"range ({result.limit:.1e})"
            )
            if not self.epoch:
                raise Unsuited(sentence, "use --precision fp32, or a larger --clip-range")
            self._warn(f"{sentence}: gradients are biased by rounding")  # as an epoch does: it may drift in a run

    def _epoch(self) -> dict[str, Any]:
        self._begun = time.monotonic()
        try:
            report = self.learner.epoch(self.epoch)
        finally:
            for text in self.drafts.warnings():
                self._warn(text)
        for text in report.warnings:
            self.listener(Warned(f"epoch {self.epoch + 1}: {text}"))
        self.flat_epochs = self.flat_epochs + 1 if report.flat else 0
        row = self._row(report)
        state = self.learner.tensors()
        with self.learner.optimisation.averaged():
            with self.stop.shielded():  # it takes less than what --save-within keeps for it
                self._save(row, state)
            self._conclude()
        self.listener(EpochDone(report))
        if self.flat_epochs >= FLAT_EPOCHS:
            raise Unsuited(
                f"the rewards did not vary in {FLAT_EPOCHS} epochs in a row: the reward cannot tell these pictures apart",
                "use another --reward, other --prompts or another --guidance",
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
        begun = time.monotonic()
        self._refuse_another()
        if not os.path.lexists(self.folder.prompts):
            self._warn(f"'{self.folder.path}' was removed or emptied: what the run still knows is written again")
            write_text(self.folder.prompts, self.plan.prompts.to_jsonl())
            self._write_evaluations()
            self.write_record(status="running")
        write_rows(self.folder.metrics, [*self.rows, row])
        numbers = {**self.learner.numbers(), "flat_epochs": self.flat_epochs}
        lora = model_card.adapter_bytes(self.learner.adapter.export(), self.plan, row["images"])
        checkpoints.save(self.folder.checkpoints, Checkpoint(row["epoch"], state, numbers), lora)
        self.epoch = row["epoch"]
        self.drafts.clear()
        self.rows.append(row)
        self._saving = time.monotonic() - begun

    def _write_evaluations(self) -> None:
        if self.heldout.history:
            write_rows(self.folder.evaluations, [dataclasses.asdict(e) for e in self.heldout.history])

    def _conclude(self) -> None:
        """Measure the epoch where that is due, and write what people look at."""
        if not self.epoch:
            return
        images = self.epoch * self.config.samples_per_epoch
        if self._evaluation_is_due():
            evaluation = self.learner.measure(self.epoch, images)
            self._refuse_another()
            self._write_evaluations()
            self.heldout.save_pictures(self._pictures, PICTURES, f"{self.rewards} after {images} images")
            self.listener(Evaluated(evaluation))
        evaluations = self.heldout.history
        reward_curve(
            self.rows,
            self.folder.curve,
            title=f"{self.plan.source.short_name}, {self.config.train}",
            reward_label=f"{self.rewards}" + (f" ({self.rewards.unit})" if self.rewards.unit else ""),
            evaluations=[_curve_point(evaluation) for evaluation in evaluations],
            watched={name: [_watched_point(e, name) for e in evaluations] for name in self.heldout.watched},
        )
        lora = model_card.adapter_bytes(self.learner.adapter.export(), self.plan, images)
        model_card.write_adapter(self.folder.adapter, lora, self.plan, {"images": images}, evaluations)
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

    def _better_than_last(self) -> Path | None:
        best = self.best_epoch if self._ended_early() else None
        return checkpoints.place(self.folder.checkpoints, best) if best not in (None, self.epoch) else None

    def _evaluation_is_due(self) -> bool:
        every = self.config.eval_every
        due = self.epoch == self.config.total_epochs or bool(every and self.epoch % every == 0)
        measured = bool(self.heldout.history) and self.heldout.history[-1].epoch == self.epoch
        ends = self.epoch == self.config.total_epochs or self._ended_early() is not None
        drawn = self._pictures.is_file() and (not ends or self.folder.before_after.is_file())
        return bool(self.heldout) and due and not (measured and drawn)

    @property
    def _pictures(self) -> Path:
        return self.folder.samples / f"epoch_{self.epoch:04d}.png"

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

    def _warn(self, text: str) -> None:
        self.listener(Warned(text))

    def _progress(self, phase: Phase | str, done: int, total: int, *, reward: float | None = None) -> None:
        self.listener(Progressed(phase, done, total, reward))
        self.stop.check(self._seconds_left(phase))
        self.team.look()

    def _seconds_left(self, phase: Phase | str) -> float:
        """Until the epoch is saved, as the last one took; what is not part of an epoch can be done again."""
        if phase in ("preflight", "evaluation") or not self.rows:
            return math.inf
        last: float = self.rows[-1]["seconds_total"]
        return max(0.0, last - (time.monotonic() - self._begun)) + self._saving


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
