"""What the README and the pages under docs/ point to is there: files, headings, images, commands and their options."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import typer

from texforce_cli.cli.app import make_app

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/**/*.md", "plugins/*/README.md", "benchmarks/**/*.md", "texforce_cli/tiny/README.md")
    for path in ROOT.glob(pattern)
)
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]


def links(page: Path) -> list[str]:
    """Where a page points to within the repository."""
    targets = re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    )
    return [target for target in targets if not re.match(r"[a-z]+:", target)]


def anchors(page: Path) -> set[str]:
    """The headings of a page as GitHub names them in links."""
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[str]:
    """Every `texforce ...` of a page, in an indented block or in a line."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    return [
        block or line for block, line in re.findall(r"^ {4,}(texforce [^#\n]+)|`(texforce [^`]+)`", text, re.MULTILINE)
    ]


def options(command: Any) -> set[str]:
    """All options of a command."""
    return {"--help", *(name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts))}


@pytest.mark.parametrize("name", NAMES)
def test_every_link_of_a_page_leads_to_a_file_and_a_heading(name: str) -> None:
    page = ROOT / name
    for target in links(page):
        path, _, anchor = target.partition("#")
        found = page.parent / path if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


def test_every_image_is_shown_by_a_page() -> None:
    shown = {(page.parent / target).resolve() for page in PAGES for target in links(page)}
    assert [path.name for path in (ROOT / "docs/images").iterdir() if path not in shown] == []


@pytest.mark.parametrize("name", NAMES)
def test_every_command_of_a_page_has_the_options_that_it_is_given(name: str) -> None:
    group: Any = typer.main.get_command(make_app([]))
    for line in commands(ROOT / name):
        words = line.split()
        command = group.commands.get(words[1])
        assert command, line
        known = options(command)
        if len(words) > 2 and words[2] in getattr(command, "commands", {}):
            known |= options(command.commands[words[2]])
        assert set(re.findall(r"(?<!\S)--[a-z][a-z-]*", line)) <= known, line
