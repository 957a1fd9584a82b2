"""The command line: one thin file a subcommand, errors as one sentence, exit codes in one place.

0 done, 1 a handled failure, 2 wrong use, 3 something is missing (eval, gpt4v-rank), 130 interrupted, 143 terminated.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import typer

from texforce_cli.cli.console import show_error
from texforce_cli.errors import Interrupted, Terminated, TexforceError, UsageError
from texforce_cli.team import launched

_MODULES = {
    "train": "train",
    "sample": "sample",
    "eval": "evaluate",
    "gpt4v-rank": "rank",
    "fuse": "fuse",
    "demo": "demo",
    "doctor": "doctor",
    "rewards": "rewards",
}
"""The file of each subcommand, in the order of the help; its function has the same name."""

_Misuse: Any = typer.BadParameter.__mro__[1]
"""What the parser raises of a command line that it does not understand: a wrong value, an option that there is not."""


def make_app(arguments: Sequence[str]) -> typer.Typer:
    """The command line, with the one subcommand that `arguments` name, or with all where they name none: each of their
    hundred options costs start-up time."""
    app = typer.Typer(
        name="texforce",
        pretty_exceptions_enable=False,
        invoke_without_command=True,
        rich_markup_mode="rich",
        epilog="Begin with: [bold]texforce demo[/bold]. Every command explains itself with --help.",
    )
    app.callback()(_main)
    named = next((argument for argument in arguments if not argument.startswith("-")), "")
    for name in [named] if named in _MODULES else _MODULES:
        module = importlib.import_module(f"texforce_cli.cli.{_MODULES[name]}")
        if isinstance(subcommands := getattr(module, "app", None), typer.Typer):
            app.add_typer(subcommands, name=name)
        else:
            app.command(name, epilog=module.EXAMPLE)(getattr(module, _MODULES[name]))
    return app


def _main(
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
    debug, as_json = "--debug" in arguments, "--json" in arguments
    arguments = ["--debug"] * debug + [argument for argument in arguments if argument != "--debug"]
    if isinstance(sys.stdout, io.TextIOWrapper):  # a pipe on Windows has few letters; stderr escapes others by itself
        sys.stdout.reconfigure(errors="backslashreplace")
    if launched()[1] > 1:  # torch, not loaded yet, may write a line for each quarter of a second that it waits
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    try:
        with _terminable():
            # the parser's own way of telling what it does not understand is for people
            code = make_app(arguments)(args=arguments, prog_name="texforce", standalone_mode=not as_json)
    except _Misuse as error:
        show_error(
            UsageError(error.format_message().removesuffix("."), "add --help to see what there is"), as_json=True
        )
        return UsageError.exit_code
    except TexforceError as error:
        if debug:
            raise
        show_error(error, as_json=as_json)
        return error.exit_code
    except Terminated:
        code = 143
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 1
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    if code in (130, 143):  # at once, and not by a command that listens
        show_error(Interrupted("stopped; what was finished is kept", exit_code=code), as_json=as_json)
    return code or 0


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Within this block SIGTERM ends what a command is doing as Ctrl-C does, where the command does not listen itself."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _terminate(number: int, frame: FrameType | None) -> None:
    raise Terminated
