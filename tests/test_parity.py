"""Our backends against their authors' packages on one checkpoint: the scores agree to 1e-5.

The packages live in environments of their own (`make test-rewards` installs them and sets TEXFORCE_TEST_HOME), whose
interpreters run the plugins of this repository. Without them these tests are skipped.
"""

from __future__ import annotations

import gzip
import json
import os
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from texforce_cli.files import write_json
from texforce_cli.rewards.builtin.hps import Hpsv2, Hpsv21
from texforce_cli.rewards.builtin.image_reward import ImageReward
from texforce_cli.rewards.environments import installed
from tools import reward_weights

pytestmark = pytest.mark.slow

HOME = os.environ.get("TEXFORCE_TEST_HOME", "")
PLUGINS = Path(__file__).parents[1] / "plugins"
PROMPTS = [
    "a cat",
    "A red DOG, in the park!",
    "three foxes; don't count them: 1 2 3",
    "Émile's café at 7pm #sunset -- 50% off   \n and more",
    "two pigs and a whale on the moon, " * 20,
    "",
]
SIZES = [(64, 64), (512, 512), (224, 224), (100, 160), (90, 47), (768, 512)]
RUN = """
import importlib, json, sys
from PIL import Image
package, name, options, cases = json.loads(sys.argv[1])
found = {}
importlib.import_module(package).texforce_register_rewards(lambda name, factory, **about: found.update({name: factory}))
module, _, attribute = found[name].partition(":")
reward = getattr(importlib.import_module(module), attribute)(**options)
images = [Image.open(file).convert("RGB") for file, _ in cases]
scores = reward.score(images, [prompt for _, prompt in cases], [{}] * len(cases))
print("\\n" + json.dumps([float(score) for score in scores]))
"""


def interpreter(package: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The interpreter of the package's environment, or the test is skipped."""
    if not HOME:
        pytest.skip("TEXFORCE_TEST_HOME is not set")
    with monkeypatch.context() as patch:
        patch.setenv("TEXFORCE_HOME", HOME)
        return next(str(found.python) for found in installed()[0] if found.package == package)


@pytest.fixture
def cases(tmp_path: Path) -> list[tuple[str, str]]:
    """Pictures of several shapes, half of them noise, as PNG files, with prompts."""
    generator = np.random.default_rng(0)
    result = []
    for i, (height, width) in enumerate(SIZES):
        grain = generator.integers(0, 256, (height, width, 3) if i % 2 else (6, 6, 3), dtype=np.uint8)
        Image.fromarray(grain).resize((width, height), Image.Resampling.BICUBIC).save(tmp_path / f"{i}.png")
        result.append((str(tmp_path / f"{i}.png"), PROMPTS[i]))
    return result


def original(
    python: str, plugin: str, name: str, options: dict[str, object], cases: list[tuple[str, str]]
) -> list[float]:
    """The scores of the authors' package."""
    folder = PLUGINS / plugin
    order = json.dumps([plugin.replace("-", "_"), name, options, cases])
    environment = {**os.environ, "PYTHONPATH": str(folder), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, "-c", RUN, order], capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    scores: list[float] = json.loads(done.stdout.splitlines()[-1])
    return scores


def opened(cases: list[tuple[str, str]]) -> tuple[list[Image.Image], list[str], list[dict[str, object]]]:
    return [Image.open(file) for file, _ in cases], [prompt for _, prompt in cases], [{} for _ in cases]


def test_image_reward_agrees_with_its_authors_package(
    tmp_path: Path, cases: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    python = interpreter("texforce-image-reward", monkeypatch)
    reward_weights.make_image_reward(tmp_path / "weights", full=False)
    options = {"weights": str(tmp_path / "weights"), "allow_pickle": True, "device": "cpu"}
    theirs = original(python, "texforce-image-reward", "image-reward", options, cases)
    ours = ImageReward(str(tmp_path / "weights"), device="cpu", allow_pickle=True).score(*opened(cases))
    assert np.std(theirs) > 0.05
    assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize(("name", "reward"), [("hpsv2", Hpsv2), ("hpsv2.1", Hpsv21)])
def test_hpsv2_agrees_with_its_authors_package(
    tmp_path: Path, cases: list[tuple[str, str]], monkeypatch: pytest.MonkeyPatch, name: str, reward: type[Hpsv2]
) -> None:
    python, folder = interpreter("texforce-hpsv2", monkeypatch), tmp_path / "weights"
    folder.mkdir()
    write_vocabulary(python, folder)
    vision = {"image_size": 224, "layers": 2, "width": 80, "head_width": 40, "patch_size": 14}
    text = {"context_length": 77, "vocab_size": 49408, "width": 64, "heads": 4, "layers": 2}
    write_json(
        folder / "open_clip_config.json", {"model_cfg": {"embed_dim": 48, "vision_cfg": vision, "text_cfg": text}}
    )
    tensors = reward_weights.filled(reward_weights.open_clip(48, vision, text), 0, torch.float16)
    torch.save({"state_dict": tensors}, folder / reward.published.file)
    options = {"weights": str(folder), "allow_pickle": True, "device": "cpu"}
    theirs = original(python, "texforce-hpsv2", name, options, cases)
    ours = reward(str(folder), device="cpu", allow_pickle=True).score(*opened(cases))
    assert np.std(theirs) > 0.05
    assert ours == pytest.approx(theirs, abs=1e-5)


def write_vocabulary(python: str, folder: Path) -> None:
    """CLIP's own vocabulary in the files of transformers, from the table of merges that open_clip carries."""
    where = "import importlib.util as u; print(u.find_spec('open_clip').submodule_search_locations[0])"
    package = subprocess.run([python, "-c", where], capture_output=True, text=True, check=True).stdout.strip()
    table = gzip.decompress((Path(package) / "bpe_simple_vocab_16e6.txt.gz").read_bytes()).decode("utf-8")
    merges = table.split("\n")[1 : 49408 - 2 * 256 - 2 + 1]
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    letters = [*map(chr, printable), *(chr(256 + i) for i in range(256 - len(printable)))]
    words = [*letters, *(letter + "</w>" for letter in letters), *(merge.replace(" ", "") for merge in merges)]
    vocabulary = {word: i for i, word in enumerate([*words, "<|startoftext|>", "<|endoftext|>"])}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
