"""The page's tab of a ranking: who is better by what a judge said, how far to trust it, and its verdicts with reasons."""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import TemplateError

from texforce_cli.files import from_json, read_json
from texforce_cli.report.page import Tab, shown, template

RANKS = "ranks"
"""The folder of an evaluation that holds one folder a ranking."""
_MOST = 300
"""Verdicts that the page shows; all of them are in verdicts.jsonl."""


def ranking_tabs(folder: Path, data: str = "") -> tuple[Tab, ...]:
    """A tab for each ranking in `folder`/ranks, in order of name; what cannot be read is passed over.

    `data` is the hash of the pictures as they are now: a ranking of others says so.
    """
    tabs = []
    for path in sorted(folder.glob(f"{RANKS}/*/summary.json")):
        try:
            summary = read_json(path)
            lines = (path.parent / "verdicts.jsonl").read_text(encoding="utf-8").split("\n")
            verdicts = [from_json(line) for line in lines if line]
            tab_id = "rank-" + re.sub("[^a-z0-9-]", lambda found: f"-{ord(found[0]):x}", path.parent.name)
            ", ".join(summary["models"])
            _html(summary, verdicts, data, {})  # a summary of another version does not break the page
        except (OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError, TemplateError):
            continue
        models = ", ".join(name for name in summary["models"] if name not in summary["judge"])
        title = f"{summary['judge']}{f' ({models})' if models else ''}, {summary['mode']}"
        tabs.append(Tab(tab_id, title, functools.partial(_html, summary, verdicts, data)))
    return tuple(tabs)


def _html(summary: Mapping[str, Any], verdicts: list[dict[str, Any]], data: str, pictures: Mapping[str, str]) -> str:
    """`pictures`: SHA-256 -> address of the picture's thumbnail."""
    usable = [row for row in verdicts if "criterion" in row and not row["placebo"]]
    return template("ranking.html").render(
        summary=summary,
        results=[(name, summary["results"][name]) for name in summary["criteria"]],
        verdicts=[_verdict(row, pictures) for row in usable[:_MOST]],
        outdated=bool(data) and summary["pictures"] != data,
        more=max(0, len(usable) - _MOST),
        number=_number,
        shown=shown,
    )


def _verdict(row: Mapping[str, Any], pictures: Mapping[str, str]) -> dict[str, Any]:
    order = range(len(row["shown"]))
    values = row.get("ranks") or row.get("scores") or []
    ranked = sorted(order, key=lambda slot: values[slot]) if row.get("ranks") else list(order)
    return {
        **row,
        "pictures": [
            {
                "name": row["shown"][slot],
                "label": chr(ord("A") + slot),
                "value": values[slot],
                "src": pictures.get(row["hashes"][slot], ""),
            }
            for slot in ranked
        ],
    }


def _number(value: float | None, decimals: int = 2, percent: bool = False) -> str:
    if value is None:
        return "–"
    return f"{100 * value:.0f} %" if percent else f"{value:.{decimals}f}".replace("-", "\u2212")
