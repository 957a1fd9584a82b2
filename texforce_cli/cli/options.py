"""Command-line options made from the fields of a configuration, so that each option has one home."""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable
from typing import Annotated, Any, Optional, get_type_hints

import typer
from rich.markup import escape

from texforce_cli.config import FIELDS, choices, field_type

_METAVARS = {int: "N", float: "X"}


def add_train_options(command: Callable[..., None]) -> Callable[..., None]:
    """Give a command that takes (**flags) one option for each field of TrainConfig that has a panel, unset by default."""
    hints = get_type_hints(command, include_extras=True)
    own = [p for p in inspect.signature(command).parameters.values() if p.kind is not p.VAR_KEYWORD]
    made = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=_annotation(name))
        for name, field in FIELDS.items()
        if field.metadata["panel"]
    ]
    own = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY, annotation=hints[p.name]) for p in own]
    command.__signature__ = inspect.Signature([*made, *own])  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in [*made, *own]}
    return command


def _annotation(name: str) -> Any:
    field = FIELDS[name]
    kind, _ = field_type(name)
    flag = "--" + name.replace("_", "-")
    flags = [f"{flag}/--no-{flag[2:]}"] if kind is bool else [flag]
    metavar = "|".join(choices(name)) or _METAVARS.get(kind, "TEXT")
    if kind is bool:
        metavar = ""
    default = field.default if field.default not in (dataclasses.MISSING, None, "", False) else None
    help = escape(field.metadata["help"]) + (f" [dim]\\[{default}][/dim]" if default is not None else "")
    about = typer.Option(
        *flags, help=help, rich_help_panel=field.metadata["panel"], metavar=metavar, show_default=False
    )
    # values stay text: config.resolve converts them, so that every mistake is told at once
    if kind is bool:
        return Annotated[Optional[bool], about]
    return Annotated[Optional[list[str]] if kind == list[str] else Optional[str], about]
