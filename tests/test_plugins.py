"""The worked example, as a third party's package: installed by the command, checked, trained on, removed."""

from __future__ import annotations

import importlib.metadata
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from texforce_cli.cli.app import run
from texforce_cli.rewards import environments
from texforce_cli.testing import check_registration, check_reward, pictures

TRAIN = (
    "train --model tiny --samples-per-epoch 8 --group-size 4 --micro-batch 4 --grad-accum 1 --steps 3 "
    "--train-steps first:2 --eval-images 4 --epochs 1"
).split()


@pytest.fixture(autouse=True)
def _somewhere_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A TEXFORCE_HOME in which the example is installed, in an environment of its own."""
    home = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TEXFORCE_HOME", str(home))
        assert run(["rewards", "install", "mean-colour", "--isolated"]) == 0
    return str(home)


@pytest.fixture
def installed(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEXFORCE_HOME", example)


@pytest.mark.usefixtures("installed")
def test_the_example_is_listed_explained_and_checked(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["rewards", "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    listed = {row["name"]: row for row in document["rewards"]}
    assert "mean-colour" not in [row["name"] for row in document["not_installed"]]
    assert listed["mean-colour"]["state"] == "isolated"
    assert listed["mean-colour"]["licence"] == "Apache-2.0"
    assert run(["rewards", "info", "mean-colour"]) == 0
    assert "--reward-option mean-colour.colour=" in capfd.readouterr().out
    Image.new("RGB", (8, 8), "cyan").save(tmp_path / "cyan.png")
    option = ["--reward-option", "mean-colour.colour=white"]
    assert run(["rewards", "check", "mean-colour", "--image", "cyan.png", *option]) == 0
    out, err = capfd.readouterr()
    assert out.strip() == f"mean-colour: {1 - 3**-0.5:.6g}"
    assert "MB at most (isolated)" in err
    assert run(["rewards", "check", "mean-colour", "--reward-timeout", "0"]) == 1
    assert "mean-colour" in capfd.readouterr().err
    assert run(["rewards", "check", "mean-colour", "--image", "nowhere.png"]) == 2


@pytest.mark.usefixtures("installed")
def test_a_run_is_trained_on_it_and_says_what_it_trained_on(tmp_path: Path) -> None:
    arguments = ["--reward-option", "mean-colour.colour=blue", "--reward-workers", "2", "--seed", "1"]
    for out in ("one", "two"):
        assert run([*TRAIN, "--reward", "mean-colour", *arguments, "--out", out]) == 0
    adapters = [next(Path(out, "adapter").glob("*.safetensors")).read_bytes() for out in ("one", "two")]
    assert adapters[0] == adapters[1]  # other processes, the same bits
    (row,) = [json.loads(line) for line in Path("one/metrics.jsonl").read_text().splitlines()]
    assert 0 < row["reward_mean"] < 1
    assert row["reward_memory_mb"]["mean-colour"] > 1
    with Image.open("one/before_after.png") as picture:
        assert picture.size[0] > 100


@pytest.mark.usefixtures("installed")
def test_an_environment_in_use_by_a_run_stays(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (environment,) = environments.installed()[0]
    with environment.in_use():
        for spelt in ("mean-colour", "Mean_Colour", "texforce-example", "TexForce_Example"):
            assert run(["rewards", "remove", spelt, "--yes"]) == 1
            assert "the environment of 'texforce-example' is in use by a run" in capfd.readouterr().err


def test_what_is_not_installed_says_how(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("TEXFORCE_HOME", str(tmp_path / "empty"))
    assert run([*TRAIN, "--reward", "mean-colour"]) == 2
    assert "texforce rewards install mean-colour" in capfd.readouterr().err
    assert run(["rewards", "check", "mean-color"]) == 2
    assert "did you mean 'mean-colour'" in capfd.readouterr().err
    assert run(["rewards"]) == 0
    out, err = capfd.readouterr()
    assert "not installed" in out and "texforce rewards install NAME" in err
    assert run(["rewards", "--json"]) == 0
    absent = {(row["name"], row["backend"]): row for row in json.loads(capfd.readouterr().out)["not_installed"]}
    assert {name for name, _ in absent} == set(environments.OURS)
    assert absent["face-iqa", ""]["licence"].startswith("non-commercial")
    assert absent["hpsv2", "original"]["origin"] == "texforce-hpsv2" and all(row["summary"] for row in absent.values())


def test_only_commands_that_need_rewards_look_for_plugins(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, find = [], importlib.metadata.entry_points

    def entry_points(**about: Any) -> Any:
        asked.append(about.get("group"))
        return find(**about)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    for arguments in (["--help"], ["train", "--help"], ["fuse", "nowhere"], ["sample", "a cat", "--lora", "nowhere"]):
        run(arguments)
        assert "texforce" not in asked, arguments
    run(["rewards"])
    assert "texforce" in asked


def test_third_party_code_is_confirmed(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert run(["rewards", "new", "my-own"]) == 0
    assert run(["rewards", "install", "./texforce-my-own"]) == 2
    assert "third-party code" in capfd.readouterr().err


def test_the_example_keeps_the_contract(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Path(__file__).parents[1] / "plugins" / "texforce-example"
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    check_reward("texforce_example", "mean-colour", options={"colour": "#ff8800"})


def test_the_contract_test_finds_what_is_wrong(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def plugin(
        name: str,
        score: str,
        about: str = "summary='s', api_version=1",
        top: str = "",
        mark: str = "@pluggy.HookimplMarker('texforce')",
        kind: str = "uint8",
        more: str = "",
    ) -> str:
        text = (
            f"import pluggy\n{top}\n{mark}\n"
            f"def texforce_register_rewards(register):\n    register('r', '{name}:R', {about})\n"
            f"class R:\n    input = '{kind}'\n    n = 0\n    def score(self, images, prompts, metadata):\n"
            f"        import numpy as np\n        {score}\n{more}"
        )
        (tmp_path / f"{name}.py").write_text(text)
        return name

    def gradient(formula: str) -> dict[str, str]:
        method = f"    def score_tensor(self, images, prompts):\n        return {formula}\n"
        return {"about": "summary='s', api_version=1, differentiable=True", "more": method}

    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    check_reward(plugin("smooth", "return images.mean((1, 2, 3))", **gradient("images.mean((1, 2, 3))")), "r")
    check_reward(plugin("fine", "return images.mean((1, 2, 3))"), "r")
    faults = {
        "returned 1 values": ("return [1.0]", {}),
        "not finite": ("return np.full(len(images), np.nan)", {}),
        "twice, other scores": ("self.n += 1; return images.mean((1, 2, 3)) + self.n", {}),
        "in a batch": ("return images.mean((1, 2, 3)) - images.mean()", {}),
        "leave the range": ("return images.mean((1, 2, 3))", {"about": "summary='s', api_version=1, range=(0, 1)"}),
        "has no summary": ("return images.mean((1, 2, 3))", {"about": "api_version=1"}),
        "registers nothing": ("return images.mean((1, 2, 3))", {"mark": ""}),
        "takes more than 0.05 s": ("return images.mean((1, 2, 3))", {"top": "import time; time.sleep(0.06)"}),
        "writes into the images": ("images[0].paste(0, (0, 0, 9, 9)); return [1.0] * len(images)", {"kind": "pil"}),
        "imports torch": ("return images.mean((1, 2, 3))", {"top": "import torch"}),
        "option 'size' is of the type": (
            "return images.mean((1, 2, 3))",
            {"more": "    def __init__(self, size: tuple = (1, 2)):\n        pass\n"},
        ),
        "counts must be whole numbers": ("self.counts = {'seen': 0.5}; return images.mean((1, 2, 3))", {}),
        "returns the shape": ("return images.mean((1, 2, 3))", gradient("images.mean()")),
        "the gradient is zero": ("return images.mean((1, 2, 3))", gradient("0 * images.mean((1, 2, 3))")),
    }
    for i, (sentence, (score, more)) in enumerate(faults.items()):
        module = plugin(f"fault{i}", score, **more)
        with pytest.raises((AssertionError, ValueError), match=sentence):
            check_reward(module, "r")


def test_test_pictures_differ() -> None:
    images = pictures(4)
    assert len({image.tobytes() for image in images}) == 4
    assert images.dtype == np.uint8


@pytest.mark.parametrize("name", ["_torchvision.py", "_loading.py"])
def test_what_our_packages_share_is_the_same_file(name: str) -> None:
    """Each depends on pluggy alone, so that each carries its own copy."""
    copies = list((Path(__file__).parents[1] / "plugins").glob(f"*/texforce_*/{name}"))
    assert len(copies) > 1
    assert len({path.read_bytes() for path in copies}) == 1


FOR_PHOTOGRAPHS = {"face-iqa": ("face", "photo"), "hand": ("hand", "photo")}
"""Reward -> the prompts that a run takes with it, and what it was made for; the others have neither."""


@pytest.mark.parametrize("package", sorted(set(environments.OURS.values())))
def test_every_package_of_ours_registers_what_the_table_says_and_depends_on_pluggy_alone(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(environments.resolve(package).requirement)
    project = tomllib.loads((folder / "pyproject.toml").read_text())["project"]
    assert project["dependencies"] == ["pluggy>=1.5"]
    (module,) = project["entry-points"]["texforce"].values()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    for name in (name for name, owner in environments.OURS.items() if owner == package):
        info = check_registration(module, name)
        assert info.licence
        assert (info.prompts, info.domain) == FOR_PHOTOGRAPHS.get(name, ("", ""))
    for variant in ("cpu", "cuda"):
        lines = (folder / module / "locks" / f"{variant}.txt").read_text().splitlines()
        assert lines[0].startswith("# python ")
        assert all("==" in line or line.startswith("#") for line in lines)
        assert any(line.startswith("pluggy==") for line in lines)
