"""`texforce fuse`."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional

import typer

from texforce_cli.cli.console import Json
from texforce_cli.files import user_path

if TYPE_CHECKING:
    from texforce_cli.workflows.events import Event, Listener
    from texforce_cli.workflows.extract import ExtractResult
    from texforce_cli.workflows.fuse import FusePlan, FuseResult

EXAMPLE = "Example: [bold]texforce fuse a.safetensors:0.7 b.safetensors:0.3[/bold]"
_HOW, _OUT, _EXTRACT = "How", "Output", "From whole weights"


def _share(value: Optional[float]) -> Optional[float]:
    """Refuse NaN, which the ranges of options let through, and which is neither below nor above any error."""
    if value is not None and math.isnan(value):
        from texforce_cli.errors import UsageError

        raise UsageError("'nan' is no number from 0 to 1", "write for example 0.05")
    return value


def fuse(
    sources: Annotated[
        Optional[list[str]],
        typer.Argument(
            metavar="SOURCE[:WEIGHT]...",
            help="A file, adapter, run or PEFT folder; WEIGHT is a number, or te=0.7,unet=0.3.",
            show_default=False,
        ),
    ] = None,
    method: Annotated[
        Optional[Literal["cat", "svd"]],
        typer.Option(
            help="cat: exact, the ranks add up. svd: the closest of lower rank.",
            show_default="cat, or svd with --rank or --max-error",
            rich_help_panel=_HOW,
        ),
    ] = None,
    rank: Annotated[Optional[int], typer.Option(help="Highest rank.", min=1, rich_help_panel=_HOW)] = None,
    max_error: Annotated[
        Optional[float],
        typer.Option(
            help="Lowest rank with this relative error in each module.",
            min=0,
            max=1,
            callback=_share,
            rich_help_panel=_HOW,
        ),
    ] = None,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin, .pt: tensors alone (needs torch).", rich_help_panel=_HOW)
    ] = False,
    out: Annotated[
        Optional[Path],
        typer.Option(
            parser=user_path,
            metavar="PATH",
            help="File, or folder for peft.",
            show_default="a-0.7+b-0.3.safetensors here",
            rich_help_panel=_OUT,
        ),
    ] = None,
    format: Annotated[
        Literal["diffusers", "kohya", "peft"],
        typer.Option(help="kohya: what A1111 and ComfyUI read.", rich_help_panel=_OUT),
    ] = "diffusers",
    dtype: Annotated[Literal["fp32", "fp16", "bf16"], typer.Option(rich_help_panel=_OUT)] = "fp32",
    extract: Annotated[
        Optional[tuple[str, str]],
        typer.Option(
            metavar="BASE TUNED",
            help="Make a LoRA of the difference of two models (folders or files), of --rank.",
            show_default=False,
            rich_help_panel=_EXTRACT,
        ),
    ] = None,
    max_rest: Annotated[
        float,
        typer.Option(
            help="Largest share of the change in biases, norms and embeddings.",
            min=0,
            max=1,
            callback=_share,
            rich_help_panel=_EXTRACT,
        ),
    ] = 0.01,
    force: Annotated[bool, typer.Option("--force", help="Overwrite.", rich_help_panel=_OUT)] = False,
    inspect: Annotated[
        bool, typer.Option("--inspect", help="Only say what each source is.", rich_help_panel=_OUT)
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what would be made.", rich_help_panel=_OUT)
    ] = False,
    json: Json = False,
) -> None:
    """Combine LoRAs of any format into one, exactly, without training; convert, rescale and inspect them."""
    if not extract:  # many small products, several at a time: a thread each; it is read when numpy is imported
        os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    from texforce_cli.cli.console import write_json
    from texforce_cli.errors import UsageError
    from texforce_cli.workflows.fuse import FuseRequest, plan_fuse
    from texforce_cli.workflows.fuse import fuse as run

    if inspect:
        _inspect(sources or [], allow_pickle, json)
        return
    if extract:
        if sources or method or max_error is not None or dry_run:
            raise UsageError("--extract takes no sources, --method, --max-error or --dry-run", "leave them out")
        if rank is None or out is None:
            raise UsageError(
                "--extract needs --rank and --out", "add for example: --rank 32 --out difference.safetensors"
            )
        from texforce_cli.workflows.extract import ExtractRequest
        from texforce_cli.workflows.extract import extract as run_extract

        wanted = ExtractRequest(*extract, out, rank, max_rest, format, dtype, allow_pickle, force)
        with _view() as view:
            _show_extracted(run_extract(wanted, view), json)
        return
    request = FuseRequest(
        sources=sources or [],
        out=out,
        method=method,
        rank=rank,
        max_error=max_error,
        format=format,
        precision=dtype,
        allow_pickle=allow_pickle,
        force=force,
    )
    plan = plan_fuse(request)
    if dry_run:
        about = plan.about()
        write_json({"plan": about, "warnings": plan.warnings}) if json else _show_plan(plan, about)
        return
    with _view() as view:
        result = run(plan, view)
    if json:
        write_json({"plan": plan.about(), "result": asdict(result), "warnings": plan.warnings})
    else:
        _show_result(plan, result)


@contextmanager
def _view() -> Iterator[Listener]:
    """A bar for each phase on a terminal; elsewhere warnings alone, without the import of what draws bars."""
    from texforce_cli.cli.console import plain, warn

    if not plain(sys.stderr):
        from texforce_cli.cli.live import View

        with View() as view:
            yield view
    else:
        from texforce_cli.workflows.events import Warned

        def listener(event: Event) -> None:
            if isinstance(event, Warned):
                warn(event.text)

        yield listener


def _inspect(sources: list[str], allow_pickle: bool, json: bool) -> None:
    from texforce_cli.cli.console import data, warn, write_json
    from texforce_cli.errors import UsageError
    from texforce_cli.lora.spec import parse_lora
    from texforce_cli.workflows.inspect_lora import inspect_lora

    if not sources:
        raise UsageError("there is nothing to inspect", "name one or more LoRAs")
    found = [inspect_lora(parse_lora(source).source, allow_pickle=allow_pickle) for source in sources]
    if json:
        write_json({"files": found})
        return
    for about in found:
        data(f"{about['source']}: {about['format']}, {about['base']}, {about['bytes'] / 1e6:.1f} MB")
        for component, part in about["components"].items():
            data(
                f"  {component}: {part['modules']} modules ({part['convolutions']} convolutions), rank {_counts(part['ranks'])}, "
                f"alpha {_counts(part['alphas'])}, {_counts(part['dtypes'])}, norm {part['norm']:.4g}"
            )
        for name, value in about["made_by"].items():
            data(f"  {name}: {str(value)[:300]}")
        for file, digest in zip(about["files"], about["sha256"]):
            data(f"  sha256 {digest}  {file}")
        for text in about["warnings"]:
            warn(text)


def _counts(counts: dict[str, int]) -> str:
    """`16`, or `16 (40), 8 (2) and 3 others`."""
    if len(counts) == 1:
        return next(iter(counts))
    shown = [f"{value} ({n})" for value, n in list(counts.items())[:3]]
    return ", ".join(shown) + (f" and {len(counts) - 3} others" if len(counts) > 3 else "")


def _show_plan(plan: FusePlan, about: dict[str, Any]) -> None:
    from texforce_cli.cli.console import data, warn

    for source in about["sources"]:
        data(f"{source['weight']} x {source['source']} ({source['format']}: {', '.join(source['components'])})")
    data(
        f"-> {about['out']}: {about['modules']} modules, rank at most {about['highest_rank']}, {about['method']}, "
        f"{about['format']}, {about['dtype']}, {about['base']}, at most {about['bytes'] / 1e6:.1f} MB"
    )
    for text in plan.warnings:
        warn(text)


def _show_result(plan: FusePlan, result: FuseResult) -> None:
    from texforce_cli.cli.console import data, note

    ranks = (
        f"rank {result.ranks[0]}" if len(set(result.ranks)) == 1 else f"ranks {result.ranks[0]} to {result.ranks[1]}"
    )
    note(
        f"{result.modules} modules, {ranks}, {result.bytes / 1e6:.1f} MB; read back, it differs by {result.measured_error:.1e}"
    )
    if plan.method == "svd":
        name, error = result.worst
        note(
            f"truncation left out {result.truncation_error:.2e} of the change; most in {name} ({error:.2e})"
            if name
            else "nothing was left out"
        )
    data(str(result.out))


def _show_extracted(result: ExtractResult, json: bool) -> None:
    from texforce_cli.cli.console import data, note, write_json

    if json:
        write_json({"result": asdict(result)})
        return
    note(
        f"{result.modules} modules, {result.bytes / 1e6:.1f} MB; {result.error:.2e} of their change is left out, "
        f"most in {result.worst[0]} ({result.worst[1]:.2e})"
    )
    if result.left_out:
        shown = ", ".join(f"{name} ({share:.1e})" for name, share in result.left_out[:5])
        more = f" and {len(result.left_out) - 5} more" if len(result.left_out) > 5 else ""
        note(f"{result.rest:.2%} of the squared change is in what a LoRA cannot hold: {shown}{more}")
    data(str(result.out))
