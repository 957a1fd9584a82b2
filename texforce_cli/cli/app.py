"""The command line: one thin file a subcommand, errors as one sentence, exit codes in one place."""

from __future__ import annotations

import typer

app = typer.Typer(name="texforce", pretty_exceptions_enable=False, no_args_is_help=True)


@app.callback()
def main() -> None:
    """Steer image generators with rewards: reinforcement learning on the text encoder of Stable Diffusion."""


def run(arguments: list[str]) -> int:
    """Run one command and return its exit code."""
    result = app(args=arguments, standalone_mode=False)
    return int(result or 0)
