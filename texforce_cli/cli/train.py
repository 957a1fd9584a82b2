"""`texforce train`."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from texforce_cli.cli.console import Json
from texforce_cli.cli.options import add_train_options
from texforce_cli.files import user_path

EXAMPLE = "Example: [bold]texforce train --reward jpeg-incompressibility --model tiny[/bold]"


def _train(
    *,
    config: Annotated[
        Optional[Path],
        typer.Option(
            "--config",
            parser=user_path,
            metavar="PATH",
            help="Options from a TOML file.",
            rich_help_panel="The ones that matter first",
        ),
    ] = None,
    resume: Annotated[
        Optional[str],
        typer.Option(
            "--resume", help="Go on with this run.", metavar="RUN", rich_help_panel="The ones that matter first"
        ),
    ] = None,
    auto_resume: Annotated[
        bool,
        typer.Option(
            "--auto-resume",
            help="Go on with the run in --out, where one has begun there.",
            rich_help_panel="The ones that matter first",
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the plan, load no weights.", rich_help_panel="Output")
    ] = False,
    json: Json = False,
    **flags: Any,
) -> None:
    """Fine-tune a Stable Diffusion model on any reward, with reinforcement learning on its text encoder."""
    from texforce_cli.cli.console import write_json
    from texforce_cli.cli.live import View, describe_plan, result_document, summarise
    from texforce_cli.config import given
    from texforce_cli.team import launched
    from texforce_cli.workflows import train as workflow
    from texforce_cli.workflows.events import silent
    from texforce_cli.workflows.plan import plan
    from texforce_cli.workflows.run_folder import RunFolder

    follower = launched()[0] > 0  # of a launcher's processes the first one decides and speaks
    if auto_resume and not resume and not follower:
        resume = workflow.begun(flags, config)
    if dry_run and follower:
        return
    if dry_run:
        made = workflow.recorded_plan(RunFolder.open(resume), given(flags, config)) if resume else plan(flags, config)
        describe_plan(made, begun=bool(resume), as_json=json)
        return
    with nullcontext(silent) if follower else View() as view:
        if resume:
            result = workflow.resume(resume, flags, config_file=config, listener=view)
        else:
            result = workflow.train(flags, config_file=config, listener=view)
    if follower:
        return
    summarise(result)
    if json:
        write_json(result_document(result))


train = add_train_options(_train)
train.__name__ = "train"
