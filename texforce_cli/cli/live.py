"""What a person sees while a run goes on: the plan, a bar for each phase, a line an epoch, a summary."""

from __future__ import annotations

import dataclasses
import math
from types import TracebackType
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table

from texforce_cli.cli.console import heard_or_not, note, printable, stderr, warn, write_json
from texforce_cli.errors import quoted
from texforce_cli.workflows.events import (
    Checked,
    EpochDone,
    Evaluated,
    Evaluation,
    Event,
    Note,
    Progressed,
    Started,
    Warned,
)

if TYPE_CHECKING:
    from texforce_cli.workflows.plan import Plan
    from texforce_cli.workflows.training_run import TrainResult


class View:
    """A listener that draws on stderr; bars only on a terminal."""

    def __init__(self) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[about]}"),
            console=stderr(),
            transient=True,
            disable=not stderr().is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._total = 0

    def __enter__(self) -> View:
        with heard_or_not():
            self._progress.start()
        return self

    @heard_or_not()
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    @heard_or_not()
    def __call__(self, event: Event) -> None:
        if isinstance(event, Note):
            note(event.text)
        elif isinstance(event, Warned):
            warn(event.text)
        elif isinstance(event, Started):
            self._started(event)
        elif isinstance(event, Checked):
            self._checked(event)
        elif isinstance(event, Progressed):
            about = "" if event.reward is None else f"reward so far {event.reward:.4g}"
            self._bar(str(event.phase), event.done, event.total, about)
        elif isinstance(event, Evaluated):
            note(describe_evaluation(event.evaluation))
        elif isinstance(event, EpochDone):
            self._epoch(event)

    def _started(self, event: Started) -> None:
        self._total = event.epochs
        again = f", going on after epoch {event.done}" if event.done else ""
        note(f"run folder: {event.folder}{again}")
        epochs = "1 epoch" if event.epochs == 1 else f"{event.epochs} epochs"
        note(f"{event.images} images in {epochs}; Ctrl-C stops at a safe point")
        chosen = [
            f"{name} {event.config[name]} ({origin})" for name, origin in event.origins.items() if origin != "default"
        ]
        rest = [f"{name} {event.config[name]}" for name, origin in event.origins.items() if origin == "default"]
        stderr().print(f"[dim]{printable(', '.join(chosen))}; defaults: {printable(', '.join(rest))}[/dim]")
        self._bar("epoch", event.done, event.epochs)

    def _checked(self, event: Checked) -> None:
        result = event.preflight
        note(
            f"preflight: max |ratio - 1| = {result.ratio_error:.1e} with unchanged weights (limit {result.limit:.1e}), "
            f"{result.micro_batch} images in one pass"
            + (f", {result.timestep_batch} steps of each in training" if result.timestep_batch > 1 else "")
        )
        steps = [step for step in result.steps if math.isfinite(step["sensitivity"])]
        text = ", ".join(f"{step['timestep']:.0f}: {step['sensitivity']:.2f} ({step['trained']:.0%})" for step in steps)
        stderr().print(f"[dim]sensitivity of each step (share of images trained on it): {text}[/dim]")

    def _bar(self, name: str, done: int, total: int, about: str = "") -> None:
        if name not in self._tasks:
            self._tasks[name] = self._progress.add_task(name, total=total, about=about)
        self._progress.update(self._tasks[name], completed=done, total=total)
        if about:
            self._progress.update(self._tasks[name], about=about)

    def _epoch(self, event: EpochDone) -> None:
        report = event.report
        seconds = sum(report.seconds.values())
        for phase in ("sampling", "rewards", "training"):
            if phase in self._tasks:
                self._progress.reset(self._tasks[phase])
        self._bar("epoch", report.epoch + 1, self._total, f"reward {report.reward_mean:.4g}")
        note(
            f"epoch {report.epoch + 1}/{self._total}  reward {report.reward_mean:.4f} ± {report.reward_std:.4f}  "
            f"kl {report.approx_kl:.1e}  clipped {100 * report.clip_fraction:.0f} %  {seconds:.1f} s"
        )


def describe_evaluation(evaluation: Evaluation) -> str:
    """The held-out measurement in one line."""
    d = evaluation.difference
    parts = [
        f"held-out {evaluation.mean:.4f}, base {evaluation.base_mean:.4f}: {d.mean:+.4f} ± {d.half_width:.4f} (95 %)"
    ]
    if evaluation.unseen:
        parts.append(f"unseen prompts {evaluation.unseen.mean:+.4f} ± {evaluation.unseen.half_width:.4f}")
    for name, watched in evaluation.watched.items():
        change = watched.difference
        parts.append(f"watched {name} {watched.mean:.4f}: {change.mean:+.4f} ± {change.half_width:.4f}")
    return "  " + "; ".join(parts)


def summarise(result: TrainResult) -> None:
    """Where everything is and what to do next."""
    note(f"done: {result.images} images in {result.seconds / 60:.1f} minutes")
    if result.evaluation:
        note(describe_evaluation(result.evaluation).strip())
    note(f"adapter: {result.adapter}")
    if result.best:
        note(f"the best epoch: {result.best}")
    note(f"pictures: {result.folder / 'samples'}, curve: {result.folder / 'curve.png'}")
    model = f"--model {quoted(result.model)} " if result.model else ""
    lora = quoted(result.best or result.adapter)
    note(f'next: texforce sample "a cat" {model}--lora {lora} --compare --grid --out pictures')


def result_document(result: TrainResult) -> dict[str, Any]:
    """The result as JSON values."""
    return {"run": dataclasses.asdict(result)}


def describe_plan(plan: Plan, *, begun: bool, as_json: bool) -> None:
    """The plan of a dry run: every option with its origin, and what it costs; to a run that has `begun` no advice is given."""
    cost = plan.cost()
    if as_json:
        document = {"config": dataclasses.asdict(plan.config), "origins": dict(plan.origins), "cost": cost}
        write_json({"plan": document})
        return
    note(f"model: {plan.source.name} ({plan.source.reason})")
    for sentence in plan.of_this_machine() if begun else plan.advice():
        note(sentence)
    note(f"prompts: {plan.prompts.name}, {len(plan.prompts.seen)} to train on, {len(plan.prompts.unseen)} held out")
    table = Table("option", "value", "from", box=None, header_style="bold")
    for name, value in dataclasses.asdict(plan.config).items():
        table.add_row(name.replace("_", "-"), printable(str(value)), plan.origins[name])
    stderr().print(table)
    for name, number in cost.items():
        note(f"{name.replace('_', ' ')}: {number:,.4g}" if number < 1e4 else f"{name.replace('_', ' ')}: {number:,.0f}")
