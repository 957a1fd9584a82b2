"""`texforce gpt4v-rank`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, Optional

import typer

from texforce_cli.cli.console import Json
from texforce_cli.cli.sampling import parse_seeds
from texforce_cli.files import user_path

EXAMPLE = "Example: [bold]texforce gpt4v-rank evals/color --judge clip[/bold]"
_WHAT, _JUDGE, _HOW, _LIMITS, _OUT = "What to rank", "Judge", "Protocol", "Limits", "Output"


def rank(
    evaluation: Annotated[
        Optional[Path],
        typer.Argument(
            parser=user_path,
            metavar="PATH",
            help="A folder of texforce eval; with --images one to make.",
            show_default=False,
        ),
    ] = None,
    judge: Annotated[
        str, typer.Option(help="openai:MODEL, clip, votes, or a plugin's.", show_default=False, rich_help_panel=_JUDGE)
    ] = "",
    judge_option: Annotated[
        Optional[list[str]], typer.Option(metavar="KEY=VALUE", help="Repeatable.", rich_help_panel=_JUDGE)
    ] = None,
    base_url: Annotated[
        Optional[str], typer.Option(help="Any server of the OpenAI shape.", rich_help_panel=_JUDGE)
    ] = None,
    api: Annotated[Optional[Literal["chat", "responses"]], typer.Option(rich_help_panel=_JUDGE)] = None,
    max_output_tokens: Annotated[Optional[int], typer.Option(min=16, rich_help_panel=_JUDGE)] = None,
    images: Annotated[
        Optional[list[str]],
        typer.Option(metavar="NAME=DIR", help="Pictures drawn elsewhere; repeatable.", rich_help_panel=_WHAT),
    ] = None,
    prompts: Annotated[
        str, typer.Option(help="With --images: a prompt set, or FILE.txt, .jsonl, .csv.", rich_help_panel=_WHAT)
    ] = "",
    seeds: Annotated[
        str, typer.Option(help="Of the evaluation; default its first.", show_default=False, rich_help_panel=_WHAT)
    ] = "",
    protocol: Annotated[
        Optional[Literal["paper"]],
        typer.Option(help="paper: listwise, three rounds (a reconstruction).", rich_help_panel=_HOW),
    ] = None,
    mode: Annotated[
        Optional[Literal["pairwise", "listwise", "pointwise"]],
        typer.Option(help="Default pairwise, both orders.", rich_help_panel=_HOW),
    ] = None,
    rounds: Annotated[
        Optional[int], typer.Option(min=1, max=100, help="Default 1 pairwise, else 3.", rich_help_panel=_HOW)
    ] = None,
    placebos: Annotated[
        float, typer.Option(min=0, max=1, help="Share of prompts with a pair of equals.", rich_help_panel=_HOW)
    ] = 0.05,
    seed: Annotated[int, typer.Option(help="Of the orders and placebos.", rich_help_panel=_HOW)] = 0,
    max_cost: Annotated[
        Optional[float],
        typer.Option(
            metavar="USD", min=0, help="Of all runs of this ranking; never exceeded.", rich_help_panel=_LIMITS
        ),
    ] = None,
    max_requests: Annotated[
        Optional[int], typer.Option(min=1, help="Of all runs of this ranking.", rich_help_panel=_LIMITS)
    ] = None,
    price: Annotated[
        Optional[str],
        typer.Option(
            metavar="IN,OUT[,IMAGE]", help="USD for a million tokens; tokens of a picture.", rich_help_panel=_LIMITS
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, max=256, help="Requests at once.", rich_help_panel=_LIMITS)] = 8,
    report_only: Annotated[
        bool, typer.Option("--report-only", help="Ask nothing: read the answers anew.", rich_help_panel=_OUT)
    ] = False,
    single_file: Annotated[
        bool, typer.Option("--single-file", help="The report as one file to send.", rich_help_panel=_OUT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be asked, and its cost.", rich_help_panel=_OUT)
    ] = False,
    json: Json = False,
) -> None:
    """Let a judge compare the pictures of several variants: ranks, strengths, and how far to trust them."""
    from texforce_cli.cli.console import note, warn, write_json
    from texforce_cli.cli.live import View
    from texforce_cli.errors import UsageError
    from texforce_cli.rewards.registry import to_stderr
    from texforce_cli.workflows.ranking.run import RankRequest, plan_ranking, rank_pictures

    if not judge:
        raise UsageError("no judge is given", "add --judge clip (offline), votes, or openai:MODEL")
    request = RankRequest(
        evaluation=evaluation or Path("evals/ranked" if images else "evals/latest"),
        judge=judge,
        judge_options=_options(judge_option or []),
        images=tuple(images or []),
        prompts=prompts,
        seeds=tuple(parse_seeds(seeds)) if seeds else (),
        protocol=protocol or "",
        mode=mode,
        rounds=rounds,
        seed=seed,
        placebos=placebos,
        base_url=base_url,
        api=api,
        max_output_tokens=max_output_tokens,
        price=price,
        max_cost=max_cost,
        max_requests=max_requests,
        workers=workers,
        report_only=report_only,
        single_file=single_file,
    )
    if dry_run:
        with to_stderr():
            plan = plan_ranking(request)
        _show_plan(plan, json)
        return
    with to_stderr(), View() as view:  # around all of it: one redirection for every thread that asks the judge
        result = rank_pictures(request, view)
    if json:
        write_json(dict(result.summary))
    else:
        _show(result.summary)
    for sentence in result.summary["warnings"]:
        warn(sentence)
    for reason, counts in result.summary["missing_by_variant"].items():
        warn(f"{reason}: {', '.join(f'{name} {count}' for name, count in counts.items())}")
    note(f"judgments: {result.folder}")
    if result.requests:
        spent = f", ${result.usd:.4f}" if result.usd else ""
        note(f"all runs of this ranking: {result.requests:,} requests{spent}")
    if result.page:
        note(f"report: {result.page}")
    if result.stopped:
        warn(
            f"{result.stopped}; what is answered is kept; the same command goes on, with a higher limit if that was met"
        )
    if result.stopped or result.page is None or result.summary["missing_by_variant"]:
        raise typer.Exit(3)


def _options(texts: list[str]) -> dict[str, str]:
    from texforce_cli.errors import UsageError

    options = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not (equals and key):
            raise UsageError(f"judge option '{text}' is not KEY=VALUE", "for example reward=clip-score")
        options[key] = value
    return options


def _show_plan(plan: dict[str, Any], json: bool) -> None:
    from texforce_cli.cli.console import data, write_json

    if json:
        write_json({"plan": plan})
        return
    for name, value in plan.items():
        shown = (
            ", ".join(map(str, value)) if isinstance(value, list) else f"{value:,}" if isinstance(value, int) else value
        )
        data(f"{name.replace('_', ' ')}: {shown}")


def _show(summary: Any) -> None:
    from rich.table import Table

    from texforce_cli.cli.console import data, printable, show_table

    for criterion in summary["criteria"]:
        result = summary["results"][criterion]
        table = Table(title=printable(criterion), title_justify="left", box=None, header_style="bold")
        for name in ("variant", "mean rank", "95 %", "strength", "95 %"):
            table.add_column(name, justify="left" if name == "variant" else "right")
        for name in summary["variants"]:
            table.add_column(f"beats {printable(name)}", justify="right")
        for name in summary["variants"]:
            mean, strength = result["mean_rank"][name]["all"], result["bradley_terry"][name]
            wins = result["wins"].get(name, {})
            table.add_row(
                printable(name),
                *_interval(mean),
                *_interval(strength),
                *("" if other not in wins else f"{wins[other]:.0%}" for other in summary["variants"]),
            )
        show_table(table)
        for test in result["tests"]:
            data(
                f"{test['first']} against {test['second']}: {test['rate']:.0%} of the points, "
                f"p {test['p_holm']:.3g} (Holm), {test['prompts']} prompts"
            )
        said = _trust(result)
        if said:
            data(said)
    for criterion in summary["absent"]:
        data(f"{criterion}: this judge does not know it")


def _trust(result: Any) -> str:
    """How far to trust the judge, in one line; what is not known is left out."""
    placebo = result["placebo"]
    parts = (
        (result["agreement_of_rounds"], "rounds agree: W {:.2f}"),
        (result["alpha_of_rounds"], "alpha {:.2f}"),
        (result["position"]["first_shown_won"], "the first shown got {:.0%} of the points"),
        (result["flipped"], "{:.0%} of the verdicts flipped"),
        (placebo["ties"], f"identical pictures called equal {{:.0%}} of {placebo['pairs']}"),
        (result["detectable_rate"], "a win rate of {:.0%} could be seen"),
    )
    return ", ".join(text.format(value) for value, text in parts if value is not None)


def _interval(value: dict[str, Any] | None) -> tuple[str, str]:
    if value is None:
        return "", ""
    ends = "" if value["low"] is None else f"{value['low']:.2f} to {value['high']:.2f}"
    return f"{value['mean']:.2f}", ends
