"""Who may import whom, held by reading the imports."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import texforce_cli

ROOT = Path(texforce_cli.__file__).parent
# a package may import those after it, not those before it, nor its neighbours on the same line
LAYERS = [
    {"cli", "__main__", "api", "testing"},
    {"workflows"},
    {"algorithms", "judging"},
    {"diffusion", "lora", "rewards", "prompts", "report"},
    {"tiny", "presets", "config", "files", "devices", "tensorfile", "quiet", "team", "threads"},
    {"core"},
    {"errors"},
]
NEIGHBOURS = {
    ("config", "presets"),  # the configuration is built from the presets
    ("team", "files"),  # the processes of a machine meet in a folder
}
HEAVY = {"torch", "diffusers", "transformers", "peft", "matplotlib", "numpy", "PIL", "safetensors"}
FILES = sorted(ROOT.rglob("*.py"))


def imports(path: Path) -> set[tuple[str, bool]]:
    """(module, whether at the top level of the file) for each import, those for type checkers left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names = [node.module] if node.module != "texforce_cli" else [f"texforce_cli.{a.name}" for a in node.names]
            found |= {(name, node in tree.body) for name in names}
        elif isinstance(node, ast.Import):
            found |= {(alias.name, node in tree.body) for alias in node.names}
    return found


def layer(name: str) -> int | None:
    return next((i for i, names in enumerate(LAYERS) if name in names), None)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_point_inwards(path: Path) -> None:
    own = path.relative_to(ROOT).parts[0].removesuffix(".py")
    if own == "__init__":
        return
    mine = layer(own)
    assert mine is not None, f"{own} has no place in the house"
    for module, _ in imports(path):
        if not module.startswith("texforce_cli."):
            continue
        other = module.split(".")[1]
        theirs = layer(other)
        if other == own or theirs is None:
            continue
        assert theirs > mine or (own, other) in NEIGHBOURS or own == "__main__", f"{own} imports {module}"


def test_only_the_command_line_imports_typer_and_rich() -> None:
    for path in FILES:
        if path.relative_to(ROOT).parts[0] != "cli":
            assert not {m.split(".")[0] for m, _ in imports(path)} & {"typer", "rich"}, path


def test_core_knows_no_files_and_no_diffusers() -> None:
    for path in (ROOT / "core").glob("*.py"):
        found = {m.split(".")[0] for m, _ in imports(path)}
        assert not found & {"diffusers", "transformers", "peft", "safetensors", "pathlib", "os"}, path


def test_nothing_prints_outside_the_command_line() -> None:
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in ("cli", "__main__.py"):
            continue
        calls = [n for n in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(n, ast.Call)]
        assert not any(isinstance(c.func, ast.Name) and c.func.id == "print" for c in calls), path


@pytest.mark.parametrize(
    "folder",
    [
        "cli",
        "config.py",
        "presets.py",
        "errors.py",
        "rewards/registry.py",
        "rewards/environments.py",
        "rewards/places.py",
    ],
)
def test_what_help_needs_imports_nothing_heavy(folder: str) -> None:
    target = ROOT / folder
    for path in [target] if target.is_file() else target.glob("*.py"):
        assert not {m.split(".")[0] for m, top in imports(path) if top} & HEAVY, path
