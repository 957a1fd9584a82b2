"""Where output goes: data to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer
from rich.console import Console
from rich.markup import escape

from texforce_cli.errors import TexforceError

if TYPE_CHECKING:
    from rich.table import Table

_PIPE_WIDTH = 200  # columns where there is no terminal
stderr = Console(stderr=True, soft_wrap=True, highlight=False, emoji=False)


def clean(text: str) -> str:
    """Text without control characters, which prompts and file names may hold."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def printable(text: str) -> str:
    """Text for a terminal: no control characters and no markup of rich."""
    return escape(clean(text))


def data(text: str) -> None:
    """A line of what was asked for, on stdout."""
    typer.echo(clean(text))


def show_table(table: Table) -> None:
    """A table of what was asked for, on stdout; as wide as it likes where there is no terminal."""
    Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH, highlight=False).print(table)


def note(text: str) -> None:
    """Something worth knowing."""
    stderr.print(printable(text))


def warn(text: str) -> None:
    """Something that may be wrong."""
    stderr.print(f"[yellow]warning:[/yellow] {printable(text)}")


def show_error(error: TexforceError, *, as_json: bool) -> None:
    """One sentence: what is wrong, then the remedy."""
    if as_json:
        write_json({"error": {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}})
    hint = f"; {printable(error.hint)}" if error.hint else ""
    label = "stopped" if error.exit_code in (130, 143) else "error"
    text = " ".join(error.message.removeprefix("stopped; ").splitlines())  # a file's name may hold line breaks
    stderr.print(f"[bold red]{label}:[/bold red] {printable(text)}{hint}")


def write_json(document: dict[str, Any]) -> None:
    """The one JSON document of a command with --json."""
    try:
        sys.stdout.write(json.dumps({"texforce": 1, **document}, indent=2, default=str) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has read enough
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
