"""`texforce rewards` and its subcommands."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from texforce_cli.cli.console import Json
from texforce_cli.files import user_path

if TYPE_CHECKING:
    from texforce_cli.rewards.registry import Registry

app = typer.Typer(
    invoke_without_command=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    epilog="Example: [bold]texforce rewards info jpeg-incompressibility[/bold]",
)

_NAME = Annotated[str, typer.Argument(help="A reward of the list.", show_default=False)]
_BACKEND = Annotated[str, typer.Option("--backend", help="Which way to compute it, where there are several.")]
_YES = Annotated[bool, typer.Option("--yes", "-y", help="Ask nothing.")]


@app.callback()
def rewards(context: typer.Context, json: Json = False) -> None:
    """List the rewards that can be trained on; install, check and write more of them."""
    if context.invoked_subcommand is not None:
        return
    import dataclasses

    from texforce_cli.cli.console import Dim, note, show_columns, write_json
    from texforce_cli.rewards import environments

    registry = _registry()
    found = [registry.rewards[key] for key in sorted(registry.rewards)]
    there = {info.origin for info in found}
    absent = environments.absent(there)
    if json:
        rows = [{**dataclasses.asdict(info), "environment": None, "state": info.state} for info in found]
        missing = [{**dataclasses.asdict(info), "state": "not installed"} for info in absent]
        write_json({"rewards": rows, "broken": registry.broken, "not_installed": missing})
        return
    lines: list[tuple[str, ...]] = []
    for info in [*found, *absent]:
        name = f"{info.name} ({info.backend})" if info.backend else info.name
        unit = f" ({info.unit})" if info.unit else ""
        state = info.state if info.origin in there else Dim("not installed")
        lines.append((name, state, f"{info.origin} {info.version}".strip(), info.licence, info.summary + unit))
    show_columns(("name", "state", "origin", "licence", "summary"), lines, unbroken=("name", "state"))
    if absent:
        note("install one with: texforce rewards install NAME")


@app.command(epilog="Example: [bold]texforce rewards info jpeg-incompressibility[/bold]")
def info(name: _NAME, backend: _BACKEND = "", json: Json = False) -> None:
    """Everything that is known of a reward, its options among it."""
    import dataclasses

    from rich.console import Console
    from rich.table import Table

    from texforce_cli.cli.console import printable, write_json

    found = _registry().find(name, backend)
    options = found.options()
    python = str(found.environment.python) if found.environment else ""
    if json:
        about = {**dataclasses.asdict(found), "environment": python, "state": found.state}
        write_json({"reward": about, "options": options})
        return
    facts = Table(box=None, show_header=False)
    for label, value in (
        ("name", found.name),
        ("backend", found.backend),
        ("summary", found.summary),
        ("better", "higher" if found.higher_is_better else "lower"),
        ("unit", found.unit),
        ("range", f"{found.range[0]:g} to {found.range[1]:g}" if found.range else ""),
        ("prompts", found.prompts),
        ("made for", "photographs" if found.domain == "photo" else found.domain),
        ("gradient", "yes" if found.differentiable else "no"),
        ("licence", found.licence),
        ("origin", f"{found.origin} {found.version}"),
        ("state", found.state),
        ("python", python),
    ):
        if value:
            facts.add_row(f"[bold]{label}[/bold]", printable(value))
    Console().print(facts)
    table = Table("option", "type", "default", box=None, header_style="bold")
    for option in options:
        row = f"--reward-option {found.name}.{option['name']}=", option["type"], option["default"]
        table.add_row(*map(printable, row))
    if options:
        Console().print(table)


@app.command(epilog='Example: [bold]texforce rewards check brightness --image cat.png --prompt "a cat"[/bold]')
def check(
    name: _NAME,
    image: Annotated[
        Optional[Path],
        typer.Option("--image", parser=user_path, metavar="PATH", help="A picture; by default one is drawn."),
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", help="Its prompt.")] = "a cat",
    reward_option: Annotated[Optional[list[str]], typer.Option(help="NAME.key=value; may be repeated.")] = None,
    reward_timeout: Annotated[float, typer.Option(min=0, help="Seconds that an isolated reward may take.")] = 300.0,
    json: Json = False,
) -> None:
    """Load a reward, score a picture, and say how long it took and how much memory."""
    import dataclasses

    from texforce_cli.cli.console import note, write_json
    from texforce_cli.workflows.check_reward import check_reward

    result = check_reward(name, reward_option or [], image, prompt, reward_timeout)
    if json:
        write_json({"check": dataclasses.asdict(result)})
        return
    for warning in result.warnings:
        note(warning)
    typer.echo(f"{name}: {result.score:.6g}")
    counts = "".join(f"; {key}: {number}" for key, number in result.counts.items())
    note(
        f"loaded in {result.seconds_to_load:.1f} s, scored in {result.seconds_to_score:.3f} s, "
        f"{result.memory_mb:.0f} MB at most ({result.state}){counts}"
    )


@app.command(epilog="Example: [bold]texforce rewards install hand --isolated[/bold]")
def install(
    what: Annotated[str, typer.Argument(metavar="NAME|PACKAGE|PATH", help="A reward of ours, or somebody's package.")],
    isolated: Annotated[
        bool, typer.Option("--isolated/--here", help="In an environment of its own, or beside texforce.")
    ] = True,
    python: Annotated[Optional[str], typer.Option(help="Interpreter for the environment: a path or 3.11.")] = None,
    variant: Annotated[str, typer.Option(help="Which lock: auto, cpu, cuda.", metavar="auto|cpu|cuda")] = "auto",
    yes: _YES = False,
) -> None:
    """Install a reward, by default into an environment of its own, from pinned packages."""
    from texforce_cli.cli.console import note
    from texforce_cli.errors import UsageError
    from texforce_cli.rewards import environments

    if variant not in ("auto", "cpu", "cuda"):
        raise UsageError(f"--variant '{variant}' is none of auto, cpu, cuda")
    if not isolated and python:
        raise UsageError("--python goes with --isolated", "leave it out: --here is the interpreter of texforce")
    source = environments.resolve(what)
    if not source.ours and not yes:
        _confirm(f"'{source.said}' is third-party code, which will run with your rights. Install it?")
    if not isolated:
        environments.install_here(source, note)
        note(f"installed {source.said} beside texforce")
        return
    chosen: Any = environments.automatic_variant() if variant == "auto" else variant
    made = environments.install_isolated(source, python=python, variant=chosen, say=_saying(note))
    note(f"installed {made.package} {made.version} in '{made.folder}'")
    for entry in made.rewards:
        backend = f" --reward-option {entry['name']}.backend={entry['backend']}" if entry.get("backend") else ""
        note(f"try it: texforce rewards check {entry['name']}{backend}")


@app.command(epilog="Example: [bold]texforce rewards remove texforce-hand[/bold]")
def remove(
    package: Annotated[str, typer.Argument(help="A package, or a reward that it registers.", show_default=False)],
    yes: _YES = False,
) -> None:
    """Delete the environment of a reward."""
    from texforce_cli.cli.console import note
    from texforce_cli.rewards import environments
    from texforce_cli.rewards.registry import normal

    for environment in environments.installed()[0]:
        if normal(package) in [normal(str(entry["name"])) for entry in environment.rewards]:
            package = environment.package
    package = normal(package)
    there = (environments.root() / package).is_dir()
    if not there:
        beside = [
            info.origin
            for info in _registry().rewards.values()
            if normal(info.name) == package and info.state == "here"
        ]
        package = beside[0] if beside else package
    if there and not yes:
        _confirm(f"Delete the environment of '{package}'?")
    freed = environments.remove(package)
    note(f"removed {package}: {freed / 1e6:,.0f} MB")


@app.command(epilog="Example: [bold]texforce rewards new sharpness[/bold]")
def new(
    name: Annotated[str, typer.Argument(help="Of the reward: lower case, digits, hyphens.", show_default=False)],
    out: Annotated[
        Optional[Path], typer.Option(parser=user_path, metavar="PATH", help="Folder, new. Default: texforce-<name>.")
    ] = None,
) -> None:
    """Write a plugin package for a reward of your own, with a test that passes."""
    from texforce_cli.cli.console import note
    from texforce_cli.rewards.scaffold import write_plugin

    folder = write_plugin(name, out)
    note(f"wrote '{folder}'; next: pip install -e {folder}, then texforce rewards check {name}")


def _registry() -> Registry:
    from texforce_cli.cli.console import warn
    from texforce_cli.rewards.registry import load_registry

    registry = load_registry()
    for sentence in registry.complaints():
        warn(sentence)
    return registry


def _confirm(question: str) -> None:
    from texforce_cli.errors import TexforceError, UsageError

    if not sys.stdin.isatty():
        raise UsageError(f"{question} There is no terminal to answer on", "give --yes")
    if not typer.confirm(question, err=True):
        raise TexforceError("nothing was done")


def _saying(note: Callable[[str], None]) -> Callable[[str], None]:
    return lambda text: note(f"{text} ...")
