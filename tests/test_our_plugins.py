"""The four reward packages of ours, each in its environment, with random weights in the official formats.

`make test-rewards` installs them and sets TEXFORCE_TEST_HOME; without it these tests are skipped.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from texforce_cli.cli.app import run
from texforce_cli.rewards import environments
from texforce_cli.rewards.registry import load_registry

HOME = os.environ.get("TEXFORCE_TEST_HOME", "")
ROOT = Path(__file__).parents[1]
PACKAGES = ("texforce-face-iqa", "texforce-hand", "texforce-hpsv2", "texforce-image-reward")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not HOME, reason="TEXFORCE_TEST_HOME names no folder with the four packages installed"),
]


@pytest.fixture(autouse=True)
def _home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TEXFORCE_HOME", HOME)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    """Reward -> its --reward-option arguments, for weights that `tools.reward_weights` has made."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.reward_weights", str(tmp_path_factory.mktemp("weights"))],
        cwd=ROOT,
        env={**os.environ, "TEXFORCE_HOME": HOME},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [shlex.split(line) for line in done.stdout.splitlines() if line.startswith("--reward ")]
    return {"hand": [], **{line[1]: line[2:] for line in lines}}


ORIGINAL = ("image-reward", "hpsv2", "hpsv2.1")


def given(options: dict[str, list[str]], name: str) -> list[str]:
    backend = ["--reward-option", f"{name}.backend=original"] if name in ORIGINAL else []
    return [*options[name], *backend]


def test_all_four_are_installed() -> None:
    assert {found.package for found in environments.installed()[0]} >= set(PACKAGES)
    assert not load_registry().broken


@pytest.mark.parametrize("name", ["hand", "face-iqa", *ORIGINAL])
def test_each_scores_a_picture(name: str, options: dict[str, list[str]], capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["rewards", "check", name, "--json", *given(options, name)]) == 0
    assert json.loads(capfd.readouterr().out)["check"]["state"] == "isolated"


def test_hand_tells_a_hand_from_none_and_a_spoiled_one_lies_between(
    capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    folder = ROOT / "plugins" / "texforce-hand" / "tests" / "pictures"
    means = {}
    for name in ("hand", "cut", "without"):
        with Image.open(folder / f"{name}.png") as strip:
            side, scores = strip.height, []
            for left in range(0, strip.width, side):
                strip.convert("RGB").crop((left, 0, left + side, side)).save("one.png")
                assert run(["rewards", "check", "hand", "--image", "one.png", "--json"]) == 0
                scores.append(json.loads(capfd.readouterr().out)["check"]["score"])
            means[name] = sum(scores) / len(scores)
    assert means["hand"] > means["cut"] + 0.3 > means["without"] + 0.3


def test_two_rewards_that_exclude_each_other_train_together(options: dict[str, list[str]]) -> None:
    small = "--samples-per-epoch 8 --group-size 4 --micro-batch 4 --grad-accum 1 --steps 3 --train-steps first:2"
    arguments = ["--eval-images", "2", "--epochs", "1", "--out", "both", *small.split()]
    for name in ("image-reward", "face-iqa"):
        arguments += ["--reward", name, *given(options, name)]
    assert run(["train", "--model", "tiny", *arguments]) == 0
    (row,) = [json.loads(line) for line in Path("both/metrics.jsonl").read_text().splitlines()]
    assert set(row["terms"]) == {"image-reward", "face-iqa"}
    assert all(value > 50 for value in row["reward_memory_mb"].values())
    assert row["reward_counts"]["face-iqa.pictures"] >= 8


@pytest.fixture
def without(tmp_path: Path) -> Iterator[None]:
    """Puts back what a test has taken out of the folder of environments."""
    yield
    for folder in (tmp_path / "taken").glob("*"):
        shutil.move(folder, environments.root() / folder.name)


@pytest.mark.usefixtures("without")
@pytest.mark.parametrize("package", PACKAGES)
def test_removing_one_leaves_the_others_working(package: str, options: dict[str, list[str]], tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    shutil.move(environments.root() / package, tmp_path / "taken" / package)
    for name in ("hand", "face-iqa", "image-reward", "hpsv2"):
        expected = 2 if environments.OURS[name] == package else 0
        assert run(["rewards", "check", name, *given(options, name)]) == expected, name


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_passes_its_own_tests_in_its_own_environment(package: str, tmp_path: Path) -> None:
    """With pytest beside it, for the length of the test; without those of full size, which want 8 GB of memory."""
    (found,) = [found for found in environments.installed()[0] if found.package == package]
    beside = tmp_path / "pytest"
    pip = [sys.executable, "-m", "pip", "--python", found.python, "install", "-q"]  # uv's environments have none
    subprocess.run([*pip, "--target", beside, "pytest"], check=True, capture_output=True)
    done = subprocess.run(
        [
            found.python,
            "-m",
            "pytest",
            "-q",
            "-rs",  # a contract test that was skipped for want of texforce_cli is said
            "-p",
            "no:cacheprovider",
            "-c",
            os.devnull,
            "-m",
            "not slow",
            ROOT / "plugins" / package / "tests",
        ],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(beside), str(ROOT)])},  # the contract test is in ROOT
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "texforce_cli" not in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


def test_hand_scores_the_same_with_mediapipe_1(tmp_path: Path) -> None:
    """Its own tests again, in an environment of the other lock, with a .task file made from the models of the first."""
    (found,) = [found for found in environments.installed()[0] if found.package == "texforce-hand"]
    subprocess.run([found.python, "-m", "texforce_hand", "hand.task"], cwd=tmp_path, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "venv", "env"], cwd=tmp_path, check=True)
    python, plugin = tmp_path / "env" / "bin" / "python", ROOT / "plugins" / "texforce-hand"
    pip = [python, "-m", "pip", "install", "-q"]
    subprocess.run([*pip, "--no-deps", "-r", plugin / "texforce_hand" / "locks" / "cpu-1.2.txt"], check=True)
    subprocess.run([*pip, "--no-deps", plugin], check=True)
    subprocess.run([*pip, "pytest"], check=True)
    done = subprocess.run(
        [python, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "-c", os.devnull, plugin / "tests"],
        env={**os.environ, "TEXFORCE_HAND_TASK": str(tmp_path / "hand.task"), "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0 and "texforce_cli" not in done.stdout, done.stdout[-3000:]
