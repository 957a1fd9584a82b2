"""`texforce rewards`."""

from __future__ import annotations

import typer

EXAMPLE = "Example: [bold]texforce rewards[/bold]"


def rewards(
    json: bool = typer.Option(False, "--json", help="One JSON document on stdout."),
) -> None:
    """List the rewards that can be trained on, built-in and from plugins."""
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from texforce_cli.cli.console import warn, write_json
    from texforce_cli.rewards.registry import load_registry

    registry = load_registry()
    for origin, reason in registry.broken.items():
        warn(f"plugin '{origin}' could not be loaded: {reason}")
    found = sorted(registry.rewards.values(), key=lambda info: info.name)
    if json:
        write_json({"rewards": [dataclasses.asdict(info) for info in found], "broken": registry.broken})
        return
    table = Table("name", "origin", "version", "unit", "summary", box=None, header_style="bold")
    for info in found:
        table.add_row(info.name, info.origin, info.version, info.unit, info.summary)
    Console().print(table)
