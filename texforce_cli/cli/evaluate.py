"""`texforce eval`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from math import isfinite
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from texforce_cli.cli.console import Json
from texforce_cli.cli.sampling import (
    AllowPickle,
    Batch,
    Device,
    Eta,
    Guidance,
    NegativePrompt,
    Precision,
    Scheduler,
    Size,
    Steps,
    parse_seeds,
)
from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import user_path

if TYPE_CHECKING:
    from texforce_cli.workflows.evaluation.summary import Summary

EXAMPLE = (
    "Example: [bold]texforce eval --variant base=tiny --variant tex=tiny+runs/a --prompts color --seeds 0:8 "
    "--metric brightness --out evals/color[/bold]"
)
_WHAT, _HOW, _STAGES, _OUT = "What to compare", "Sampling", "Stages", "Output"
_FIELDS = {"metric": "metrics", "metric_option": "metric_options"}
"""What an option is called in the request, where it is called otherwise."""
_RECALLED = (
    "prompts seeds metric metric_option votes baseline steps guidance eta scheduler size negative_prompt batch precision "
    "allow_pickle"
).split()
"""The options that a folder remembers."""
_REWARD = re.compile("--reward(?=(-option)? )")
"""How a reward calls, in what it says, the options that are --metric and --metric-option here."""


def evaluate(
    context: typer.Context,
    variant: Annotated[
        Optional[list[str]],
        typer.Option(
            metavar="NAME=MODEL[+LORA[:WEIGHT]]...",
            help="Repeatable; whole weights: +unet=PATH, +text-encoder=PATH.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    variants: Annotated[
        Optional[Path],
        typer.Option(
            parser=user_path,
            metavar="PATH",
            help="A TOML file of \\[\\[variants]]: name, model, unet, text_encoder, loras, images.",
            rich_help_panel=_WHAT,
        ),
    ] = None,
    unet: Annotated[
        Optional[str],
        typer.Option(help="Whole U-Net of every variant that names none: folder or file.", rich_help_panel=_WHAT),
    ] = None,
    text_encoder: Annotated[
        Optional[str], typer.Option(help="Whole text encoder, likewise.", rich_help_panel=_WHAT)
    ] = None,
    images: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME=DIR", help="Pictures drawn elsewhere; repeatable.", rich_help_panel=_WHAT),
    ] = None,
    prompts: Annotated[str, typer.Option(help="A prompt set, or FILE.txt, .jsonl, .csv.", rich_help_panel=_WHAT)] = "",
    seeds: Annotated[str, typer.Option(help="7, 0:8 or 1,5,9: each prompt with each.", rich_help_panel=_WHAT)] = "0:4",
    metric: Annotated[
        Optional[list[str]], typer.Option(help="Any reward; repeatable: texforce rewards.", rich_help_panel=_WHAT)
    ] = None,
    metric_option: Annotated[
        Optional[list[str]], typer.Option(metavar="NAME.key=value", help="Repeatable.", rich_help_panel=_WHAT)
    ] = None,
    votes: Annotated[
        Optional[list[str]],
        typer.Option(metavar="FILE", help="votes.json of the page: one more judge; repeatable.", rich_help_panel=_WHAT),
    ] = None,
    baseline: Annotated[
        Optional[str], typer.Option(help="Default: the first variant.", show_default=False, rich_help_panel=_WHAT)
    ] = None,
    steps: Steps = None,
    guidance: Guidance = None,
    eta: Eta = None,
    scheduler: Scheduler = "ddim",
    size: Size = None,
    negative_prompt: NegativePrompt = None,
    batch: Batch = 8,
    device: Device = "auto",
    precision: Precision = "fp32",
    allow_pickle: AllowPickle = False,
    num_processes: Annotated[
        int,
        typer.Option(
            help="Draw in several processes, which share the CPU's threads: with as many each, the result is the same.",
            min=1,
            max=64,
            rich_help_panel=_HOW,
        ),
    ] = 1,
    images_only: Annotated[
        bool, typer.Option("--images-only", help="Draw, score nothing.", rich_help_panel=_STAGES)
    ] = False,
    score_only: Annotated[
        bool, typer.Option("--score-only", help="Draw nothing: score, then the report.", rich_help_panel=_STAGES)
    ] = False,
    report_only: Annotated[
        bool,
        typer.Option(
            "--report-only", help="Draw and score nothing: the report of what is there.", rich_help_panel=_STAGES
        ),
    ] = False,
    out: Annotated[
        Path,
        typer.Option(
            parser=user_path,
            metavar="PATH",
            help="Folder of pictures, scores.jsonl and .csv, summary.json and .csv, report; alone: go on there.",
            rich_help_panel=_OUT,
        ),
    ] = Path("evals/latest"),
    single_file: Annotated[
        bool, typer.Option("--single-file", help="The report as one file to send.", rich_help_panel=_OUT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be drawn and scored.", rich_help_panel=_OUT)
    ] = False,
    json: Json = False,
) -> None:
    """Compare models and LoRAs on the same prompts and noise: paired intervals, win rates, a page to look at."""
    from texforce_cli.cli.console import note, warn, write_json
    from texforce_cli.cli.live import View
    from texforce_cli.team import launched
    from texforce_cli.workflows.evaluation.plan import plan_eval
    from texforce_cli.workflows.evaluation.request import EvalRequest, Stage, gather_variants
    from texforce_cli.workflows.evaluation.sharing import evaluate_in
    from texforce_cli.workflows.events import silent

    if images_only + score_only + report_only > 1:
        raise UsageError("--images-only, --score-only and --report-only exclude each other", "give one of them")
    stage: Stage = "images" if images_only else "scores" if score_only else "report" if report_only else "all"
    request = EvalRequest(
        out=out,
        variants=gather_variants(variant or [], variants, images or [], unet=unet, text_encoder=text_encoder),
        baseline=baseline,
        prompts=prompts,
        seeds=tuple(parse_seeds(seeds)),
        metrics=tuple(metric or []),
        metric_options=tuple(metric_option or []),
        steps=steps,
        guidance=guidance,
        eta=eta,
        scheduler=scheduler,
        size=size,
        negative_prompt=negative_prompt,
        batch=batch,
        device=device,
        precision=precision,
        allow_pickle=allow_pickle,
        single_file=single_file,
        votes=tuple(votes or []),
        stage=stage,
        given=tuple(_FIELDS.get(name, name) for name in _RECALLED if _is_given(context, name)),
    )
    follower = launched()[0] > 0  # of a launcher's processes the first one speaks
    if dry_run:
        with _of_metrics():
            plan = plan_eval(request)
        if not follower:
            _show_plan(plan, json)
        return
    with _of_metrics(), nullcontext(silent) if follower else View() as view:
        result = evaluate_in(num_processes, request, view)
    if follower:
        return
    if result.summary is None:
        note(f"pictures: {out / 'pictures'}")
        if json:
            write_json({"folder": str(out), "missing": list(result.missing)})
    elif json:
        write_json(result.summary.plain())
    else:
        _show(result.summary)
        for sentence in result.summary.left_out:
            warn(sentence)
    for sentence in result.sentences[:5]:
        warn(sentence)
    if len(result.missing) > 5:
        where = f": {out / 'summary.json'}" if result.summary else ""
        warn(f"and {len(result.missing) - 5} more are missing{where}")
    if result.page:
        note(f"report: {result.page}")
    if result.missing:
        raise typer.Exit(3)


@contextmanager
def _of_metrics() -> Iterator[None]:
    """What an error says of options for rewards, it says of those for metrics."""
    try:
        yield
    except TexforceError as error:
        error.message = _REWARD.sub("--metric", error.message)
        error.hint = error.hint and _REWARD.sub("--metric", error.hint)
        raise


def _is_given(context: typer.Context, name: str) -> bool:
    source = context.get_parameter_source(name)
    return source is not None and source.name in ("COMMANDLINE", "ENVIRONMENT")


def _show_plan(plan: dict[str, Any], json: bool) -> None:
    from texforce_cli.cli.console import data, warn, write_json

    if json:
        write_json({"plan": plan})
        return
    for variant in plan["variants"]:
        calls = f", {variant['unet_calls']:,} U-Net calls" if "unet_calls" in variant else ""
        data(f"{variant['name']}: {variant['description']}, {variant['pictures']:,} pictures{calls}")
    least = "at least " if plan["prompts"]["name"] in plan["not_there_yet"] else ""
    data(f"{least}{plan['prompts']['count']} prompts of {plan['prompts']['name']}, {len(plan['seeds'])} seeds each")
    data(f"metrics: {', '.join(plan['metrics'])}; baseline: {plan['baseline']}")
    for path in plan["not_there_yet"]:
        warn(f"'{path}' is not there yet")


def _show(summary: Summary) -> None:
    from rich.table import Table

    from texforce_cli.cli.console import printable, show_table

    groups = list(dict.fromkeys(row.group for row in summary.rows))
    marks = {v["name"]: set(v["in_sample"]) for v in summary.about.get("variants", [])}
    for group in groups:
        table = Table(
            title=None if len(groups) == 1 else printable(group), title_justify="left", box=None, header_style="bold"
        )
        for name in (
            "metric",
            "variant",
            "mean",
            f"difference to {printable(summary.baseline)}",
            "95 %",
            "wins",
            "p (Holm)",
            "n",
        ):
            table.add_column(name, justify="left" if name in ("metric", "variant") else "right")
        for row in (row for row in summary.rows if row.group == group):
            mark = " (in-sample)" if row.metric in marks.get(row.variant, ()) else ""
            table.add_row(
                printable(row.metric) + mark,
                printable(row.variant),
                f"{row.mean:.4g}",
                *_against(row),
                f"{row.prompts}" + (f" ({row.label})" if row.label else ""),
            )
        show_table(table)


def _against(row: Any) -> tuple[str, str, str, str]:
    if row.difference is None:
        return "", "", "", ""
    if isfinite(row.difference_low) and isfinite(row.difference_high):
        between = f"{row.difference_low:+.4g} to {row.difference_high:+.4g}"
    else:  # of a single prompt or seed, or of some that all say the same
        between = "none"
    wins = "" if row.win_rate is None else f"{row.win_rate:.0%}"
    p = "" if row.p_holm is None else "<0.001" if row.p_holm < 0.001 else f"{row.p_holm:.3f}"
    return f"{row.difference:+.4g}", between, wins, p
