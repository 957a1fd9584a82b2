"""`texforce rewards new NAME`: a complete plugin package, to be filled in."""

from __future__ import annotations

import keyword
import re
from pathlib import Path

from texforce_cli.errors import UsageError
from texforce_cli.files import write_text
from texforce_cli.rewards.environments import OURS, built_in_names
from texforce_cli.rewards.registry import normal

_PYPROJECT = """\
[build-system]
requires = ["hatchling>=1.27"]
build-backend = "hatchling.build"

[project]
name = "texforce-{name}"
version = "0.1.0"
description = "The reward '{name}' for texforce"
requires-python = ">=3.10"
dependencies = ["pluggy>=1.5", "numpy"]

[project.entry-points.texforce]
{name} = "{module}"
"""

_INIT = '''\
"""Registers the reward `{name}`; imports pluggy and nothing heavy."""

import pluggy

hookimpl = pluggy.HookimplMarker("texforce")


@hookimpl
def texforce_register_rewards(register):
    """Called once by texforce."""
    register("{name}", "{module}.reward:{cls}", summary="say here what it measures", range=(0, 1), api_version=1)
'''

_REWARD = '''\
"""The reward `{name}`."""

import numpy as np


class {cls}:
    """Share of the pixels that are brighter than `threshold`. Replace it by what you want more of.

    Args:
        threshold: between 0 and 1.
    """

    input = "uint8"  # one array [N, height, width, 3]; without this line, a list of PIL pictures

    def __init__(self, threshold: float = 0.5):
        self.threshold = threshold

    def score(self, images, prompts, metadata):
        """One number an image, in order."""
        return (images.mean(-1) > 255 * self.threshold).mean((1, 2)).astype(np.float64)
'''

_TEST = '''\
"""Run with: pip install pytest -e . where texforce is installed; pytest"""

import numpy as np
import pytest

from {module}.reward import {cls}


def test_half_of_the_pixels_are_bright():
    image = np.zeros((1, 4, 4, 3), np.uint8)
    image[:, :2] = 255
    assert {cls}().score(image, ["a cat"], [{{}}])[0] == 0.5


def test_it_keeps_the_contract_of_texforce():
    testing = pytest.importorskip("texforce_cli.testing")
    testing.check_reward("{module}", "{name}")
'''

_README = """\
# texforce-{name}

The reward `{name}` for texforce: say what it measures, for which pictures, and under which licence its weights are.

    pip install -e .        # beside texforce; or: texforce rewards install . --isolated
    texforce rewards check {name}
    texforce train --reward {name} --model tiny

Packages that it needs go into `dependencies` of `pyproject.toml`; when they conflict with those of texforce, install it
with `--isolated`. A lock of exact versions in `{module}/locks/cpu.txt` (and `cuda.txt`) is used there instead.
"""


def write_plugin(name: str, out: Path | None = None) -> Path:
    """Write the package for the reward `name` into `out`, by default `texforce-<name>`; the folder.

    Raises:
        UsageError: a name that cannot be one or that texforce's own rewards have, or a folder that exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name):
        raise UsageError(
            f"'{name}' cannot be the name of a reward", "use lower case, digits and hyphens, as in edge-count"
        )
    if name in map(normal, [*OURS, *built_in_names()]):
        raise UsageError(f"'{name}' is the name of a reward that comes with texforce", "choose another")
    words = {
        "name": name,
        "module": "texforce_" + name.replace("-", "_"),
        "cls": "".join(part.capitalize() for part in name.split("-")),
    }
    if keyword.iskeyword(words["cls"]) or words["module"] == "texforce_cli":
        raise UsageError(f"'{name}' cannot be the name of a reward: Python or texforce has it", "choose another")
    folder = out or Path(f"texforce-{name}")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UsageError(f"'{folder}' exists and is not empty", "choose another with --out")
    files = {
        "pyproject.toml": _PYPROJECT,
        "README.md": _README,
        f"{words['module']}/__init__.py": _INIT,
        f"{words['module']}/reward.py": _REWARD,
        f"tests/test_{words['module']}.py": _TEST,
    }
    for path, text in files.items():
        write_text(folder / path, text.format(**words))
    return folder
