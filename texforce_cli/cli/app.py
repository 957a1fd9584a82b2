"""The command line: one thin file a subcommand, errors as one sentence, exit codes in one place.

0 done, 1 a handled failure, 2 wrong use, 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import sys

import typer

from texforce_cli.cli import demo, doctor, evaluate, fuse, rank, rewards, sample, train
from texforce_cli.cli.console import show_error
from texforce_cli.errors import TexforceError

app = typer.Typer(
    name="texforce",
    pretty_exceptions_enable=False,
    invoke_without_command=True,
    rich_markup_mode="rich",
    epilog="Begin with: [bold]texforce demo[/bold]. Every command explains itself with --help.",
)
app.command(epilog=train.EXAMPLE)(train.train)
app.command(epilog=sample.EXAMPLE)(sample.sample)
app.command("eval", epilog=evaluate.EXAMPLE)(evaluate.evaluate)
app.command("gpt4v-rank", epilog=rank.EXAMPLE)(rank.rank)
app.command(epilog=fuse.EXAMPLE)(fuse.fuse)
app.command(epilog=demo.EXAMPLE)(demo.demo)
app.command(epilog=doctor.EXAMPLE)(doctor.doctor)
app.add_typer(rewards.app, name="rewards")


@app.callback()
def main(
    context: typer.Context,
    version: bool = typer.Option(False, "--version", help="Show the version and exit."),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Steer image generators with rewards: reinforcement learning on the text encoder of Stable Diffusion."""
    if version:
        from texforce_cli import __version__

        typer.echo(f"texforce {__version__}")
    elif context.invoked_subcommand is None:
        typer.echo(context.get_help())


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code; an error of the user is one sentence, a bug is a traceback."""
    debug = "--debug" in arguments
    arguments = ["--debug"] * debug + [argument for argument in arguments if argument != "--debug"]
    try:
        app(args=arguments, prog_name="texforce")
    except TexforceError as error:
        if debug:
            raise
        show_error(error, as_json="--json" in arguments)
        return error.exit_code
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0
