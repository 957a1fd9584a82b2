"""Where output goes: data to stdout, everything else to stderr.

rich is imported only where it draws: it takes a quarter of the start-up of a quick command, and plain text needs none of it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from texforce_cli.errors import TexforceError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Json = Annotated[bool, typer.Option("--json", help="One JSON document on stdout.", rich_help_panel="Output")]
_PIPE_WIDTH = 300  # columns where there is no terminal


class Dim(str):
    """A cell that matters less than the others."""


@functools.cache
def stderr() -> Console:
    """What rich draws on, where it does."""
    from rich.console import Console

    class Stderr(Console):
        def on_broken_pipe(self) -> None:  # rich would end the program
            _silence()

    return Stderr(stderr=True, soft_wrap=True, highlight=False, emoji=False)


@contextlib.contextmanager
def heard_or_not() -> Iterator[None]:
    """What is said within does not end what it speaks of: where stderr is on a full disk, or a terminal or reader that is gone,
    nothing more is said.
    """
    try:
        yield
    except OSError:
        _silence()


def _silence() -> None:
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stderr.fileno())  # so that libraries and rewards may go on writing there
    os.close(nowhere)


def plain(stream: TextIO) -> bool:
    """Whether rich would leave text as it is: no terminal, and nobody who says that there is one."""
    return not (stream.isatty() or os.environ.get("FORCE_COLOR") or os.environ.get("TTY_COMPATIBLE"))


def clean(text: str) -> str:
    """Text without control characters, which prompts and file names may hold."""
    return "".join(c if c.isprintable() or c == "\n" else "�" for c in text)


def printable(text: str) -> str:
    """Text for a terminal: no control characters and no markup of rich."""
    from rich.markup import escape

    return escape(clean(text))


def data(text: str) -> None:
    """A line of what was asked for, on stdout."""
    typer.echo(clean(text))


def show_table(table: Table) -> None:
    """A table of what was asked for, on stdout; as wide as it likes where there is no terminal."""
    from rich.console import Console

    width = None if sys.stdout.isatty() else _PIPE_WIDTH
    Console(width=width, highlight=False, emoji=False).print(table)


def show_columns(titles: Sequence[str], rows: Sequence[Sequence[str]], *, unbroken: Sequence[str] = ()) -> None:
    """A table of plain text on stdout; the columns `unbroken` keep each cell on one line."""
    rows = [[type(cell)(clean(cell)) for cell in row] for row in rows]
    if plain(sys.stdout) and (text := _aligned([titles, *rows])):
        typer.echo(text)
        return
    from rich.table import Table

    table = Table(box=None, header_style="bold")
    for title in titles:
        table.add_column(title, no_wrap=title in unbroken)
    for row in rows:
        table.add_row(*(f"[dim]{printable(cell)}[/dim]" if isinstance(cell, Dim) else printable(cell) for cell in row))
    show_table(table)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    """The table as rich sets it, while every letter is one column wide and every line fits; else ""."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    simple = all(cell.isascii() and cell.isprintable() for row in rows for cell in row)
    if not simple or sum(widths) + 2 * len(widths) > _PIPE_WIDTH:
        return ""
    return "\n".join("".join(f" {cell:<{width}} " for cell, width in zip(row, widths)) for row in rows)


def note(text: str) -> None:
    """Something worth knowing."""
    _say("", "", text)


def warn(text: str) -> None:
    """Something that may be wrong."""
    _say("warning:", "yellow", text)


@heard_or_not()
def _say(label: str, style: str, text: str) -> None:
    if plain(sys.stderr):
        typer.echo(f"{label} {clean(text)}" if label else clean(text), err=True)
    else:
        stderr().print(f"[{style}]{label}[/{style}] {printable(text)}" if label else printable(text))


def show_error(error: TexforceError, *, as_json: bool) -> None:
    """One sentence: what is wrong, then the remedy."""
    if as_json:
        write_json({"error": {"message": error.message, "hint": error.hint, "exit_code": error.exit_code}})
    hint = f"; {error.hint}" if error.hint else ""
    label = "stopped" if error.exit_code in (130, 143) else "error"
    text = " ".join(error.message.removeprefix("stopped; ").splitlines())  # a file's name may hold line breaks
    _say(f"{label}:", "bold red", text + hint)


def write_json(document: dict[str, Any]) -> None:
    """The one JSON document of a command with --json."""
    try:
        sys.stdout.write(json.dumps({"texforce": 1, **document}, indent=2, default=str) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # whoever read it has read enough
        sys.stdout = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115 - until the process ends
