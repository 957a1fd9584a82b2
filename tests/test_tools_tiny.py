"""The world that the embedded model is trained on, and the loop that trains it."""

import itertools
import json
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import CLIPTokenizer

from texforce_cli import tiny
from texforce_cli.tiny.words import ANIMALS, COLOURS, TINTED, held_out
from tools.tiny import __main__ as command_of_tiny
from tools.tiny import pictures
from tools.tiny.tokenizer import build_tokenizer, words
from tools.tiny.training import Recipe, train
from tools.tiny.unet import weight
from tools.tiny.world import FONT, Item, Scene, caption, changes, corrupt, draw_scene, render


def test_captions_read_like_the_paper() -> None:
    assert caption(Scene((Item("wolf"),) * 4, "in the forest")) == "four wolves in the forest"
    assert caption(Scene((Item("cat"), Item("dog")))) == "a cat and a dog"
    assert caption(Scene((Item("dog"),), "on the moon")) == "a dog on the moon"
    assert caption(Scene((Item("apple", "orange"),))) == "an orange apple"
    varied = {caption(Scene((Item("rabbit", "green"),)), random.Random(seed)) for seed in range(40)}
    assert {"a green colored rabbit", "a green rabbit", "a photo of a green rabbit"} <= varied
    faces = {caption(Scene((Item("man"),)), random.Random(seed)) for seed in range(40)}
    assert "a complete face of a man" in faces


def test_a_fifth_of_the_pairs_is_held_out_and_every_word_is_seen() -> None:
    pairs = {(noun, colour) for noun in TINTED for colour in COLOURS if held_out(noun, colour)}
    assert 0.15 < len(pairs) / (len(TINTED) * len(COLOURS)) < 0.25
    assert len(ANIMALS) >= 25
    assert max(Counter(noun for noun, _ in pairs).values()) <= 2
    assert max(Counter(colour for _, colour in pairs).values()) < len(TINTED) / 2


def test_held_out_pairs_are_neither_drawn_nor_named_in_training() -> None:
    rng = random.Random(0)
    for _ in range(3000):
        scene = draw_scene(rng)
        assert not scene.pairs_held_out
        assert not corrupt(scene, rng).pairs_held_out
    assert draw_scene(rng, "color", held=True).pairs_held_out


def test_the_share_of_wrong_captions_is_what_the_model_card_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pictures, "render", lambda scene, rng: np.zeros((1, 1, 3), np.uint8))  # captions alone matter
    _, lines = pictures._chunk(("train", 0, 0, 2000, {}))
    wrong = 0
    for row in map(json.loads, lines):
        scene = Scene(tuple(Item(**item) for item in row["items"]), row["place"])
        wrong += row["caption"] not in {caption(scene, random.Random(seed)) for seed in range(100)}
    card = (tiny.WEIGHTS.parent / "README.md").read_text()
    assert "22 % lose or change an attribute" in card
    assert wrong / len(lines) == pytest.approx(0.22, abs=0.02)


def test_the_tokenizer_is_the_same_each_time_and_knows_every_word(tmp_path: Path) -> None:
    made = set()
    for turn in range(6):  # the library's tables of words begin each in an order of their own
        learnt = build_tokenizer(tmp_path / str(turn))
        made.add((tmp_path / str(turn) / "tokenizer.json").read_bytes())
    assert len(made) == 1
    shipped = CLIPTokenizer.from_pretrained(tiny.WEIGHTS / "tokenizer")
    assert len(learnt) == len(shipped) == 765
    assert all(len(shipped(word).input_ids) == 3 for word in words())  # start, the word, end


def test_people_are_never_tinted() -> None:
    rng = random.Random(1)
    for _ in range(3000):
        scene = draw_scene(rng, held=None)
        for other in [scene, *changes(scene, rng).values(), corrupt(scene, rng)]:
            assert all(item.colour is None or item.noun in TINTED for item in other.items)


@pytest.mark.parametrize("seed", range(20))
def test_each_change_differs_in_its_attribute_alone(seed: int) -> None:
    rng = random.Random(seed)
    scene = draw_scene(rng, held=None)
    for name, other in changes(scene, rng).items():
        assert other != scene
        assert (other.place != scene.place) == (name == "location")
        assert (len(other.items) != len(scene.items)) == (name == "count")
        nouns = [item.noun for item in other.items], [item.noun for item in scene.items]
        if name == "color":
            assert nouns[0] == nouns[1]
        if name in ("object", "composition"):
            assert nouns[0] != nouns[1]
            assert [item.colour for item in other.items] == [item.colour for item in scene.items]


Loss = Callable[[torch.Generator], torch.Tensor]


def broken_off(loss: Loss, stop_at: int | None) -> Loss:
    """`loss`, with Ctrl-C before its call number `stop_at`."""
    calls = itertools.count()

    def counted(generator: torch.Generator) -> torch.Tensor:
        if next(calls) == stop_at:
            raise KeyboardInterrupt
        return loss(generator)

    return counted


def regression(folder: Path, steps: int, stop_at: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1)

    def loss(generator: torch.Generator) -> torch.Tensor:
        x = torch.randn((8, 3), generator=generator)
        return (model(x) - x.sum(1, keepdim=True)).pow(2).mean()

    train(Recipe("line", steps, 0.05, warmup=5, ema=0.9), {"line": model}, [broken_off(loss, stop_at)], folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_an_interrupted_training_continues_to_the_same_bits(tmp_path: Path) -> None:
    whole = regression(tmp_path / "whole", 120)
    with pytest.raises(KeyboardInterrupt):
        regression(tmp_path / "broken", 120, stop_at=50)
    assert torch.equal(regression(tmp_path / "broken", 120), whole)
    assert torch.allclose(whole[:3], torch.ones(3), atol=0.1)  # the sum of the inputs has been learnt
    assert torch.equal(regression(tmp_path / "whole", 120, stop_at=0), whole)  # a finished one is only loaded


def kernels(folder: Path, stop_at: int | None = None) -> torch.Tensor:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(4, 6, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(6, 4, 3, padding=1)
    )
    model.to(memory_format=torch.channels_last)

    def loss(generator: torch.Generator) -> torch.Tensor:
        x = torch.randn((4, 4, 8, 8), generator=generator)
        return (model(x) - x).pow(2).mean()

    parts = [broken_off(loss, stop_at)] * 2
    train(Recipe("kernels", 40, 1e-3, muon=3e-3, warmup=5, ema=0.9), {"kernels": model}, parts, folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def test_the_recipe_of_the_u_net_continues_to_the_same_bits(tmp_path: Path) -> None:
    """Muon within, AdamW around it, kernels in channels_last, two parts of a batch."""
    whole = kernels(tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        kernels(tmp_path / "broken", stop_at=31)
    assert torch.equal(kernels(tmp_path / "broken"), whole)


def test_a_checkpoint_of_another_recipe_is_not_continued(tmp_path: Path) -> None:
    regression(tmp_path, 10)
    with pytest.raises(SystemExit, match="another recipe"):
        regression(tmp_path, 20)


def test_what_is_installed_is_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made, package = tmp_path / "made", tmp_path / "package"
    for name in ("weights", "clip", "judge"):
        (made / name).mkdir(parents=True)
        (made / name / "config.json").write_text(name)
    (made / "measured.json").write_text('{"steps": 20}\n')
    (package / "weights").mkdir(parents=True)
    (package / "weights" / "old.safetensors").write_text("of another version")
    (package / "measured.json").write_text('{"steps": 10}\n')
    monkeypatch.setattr(tiny, "WEIGHTS", package / "weights")
    monkeypatch.setattr(tiny, "MANIFEST", package / "manifest.json")
    command_of_tiny.install(made, "9.9")
    assert tiny.manifest() == {"version": "9.9", "sha256": tiny.weights_sha256()}
    assert [file.name for file in (package / "weights").iterdir()] == ["config.json"]
    assert (package / "judge" / "config.json").read_text() == "judge"
    assert json.loads((package / "measured.json").read_text()) == {"steps": 20}


def test_three_steps_of_everything_are_never_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tiny, "WEIGHTS", tmp_path / "package" / "weights")
    monkeypatch.setattr(tiny, "MANIFEST", tmp_path / "package" / "manifest.json")
    with pytest.raises(SystemExit) as ended:
        command_of_tiny.main([str(tmp_path / "made"), "--smoke", "--install", "9.9"])
    assert ended.value.code == 2
    assert "--smoke" in capsys.readouterr().err
    assert not (tmp_path / "made").exists()


needs_font = pytest.mark.skipif(not Path(FONT).exists(), reason="needs the package fonts-noto-color-emoji")


@needs_font
def test_sprites_lie_on_the_grid_of_the_network() -> None:
    lefts = set()
    for seed in range(20):
        picture = render(Scene((Item("car"),)), random.Random(seed)).astype(int)
        red = np.flatnonzero((picture[..., 0] - picture[..., 1] > 60).any(0))
        lefts.add(int(red.min()))
        assert red.max() - red.min() < 48
    assert len(lefts) == 3 and len({left % 8 for left in lefts}) == 1


@needs_font
@pytest.mark.slow
def test_the_command_makes_measures_and_repeats_the_whole(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.tiny", "--smoke", "--threads", "1"]
    for folder in ("one", "two", "one"):  # the last passes over everything
        subprocess.run([*command, str(tmp_path / folder)], check=True, cwd=Path(__file__).parent.parent)
    figures = json.loads((tmp_path / "one" / "measured.json").read_text())
    assert set(figures["accuracy"]) == {"real", "shuffled", "guidance 1", "guidance 3"}
    for part in ("weights/unet/diffusion_pytorch_model", "clip/model", "judge/model"):
        one, two = ((tmp_path / folder / f"{part}.safetensors").read_bytes() for folder in ("one", "two"))
        assert one == two, part


@needs_font
@pytest.mark.slow
def test_the_second_backbone_predicts_the_noise(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tools.tiny", "--smoke", "--epsilon", "--threads", "1", str(tmp_path)]
    subprocess.run(command, check=True, cwd=Path(__file__).parent.parent)
    about = json.loads((tmp_path / "weights" / "scheduler" / "scheduler_config.json").read_text())
    assert about["prediction_type"] == "epsilon"
    assert json.loads((tmp_path / "measured.json").read_text())["PSNR of the autoencoder, dB"] > 30  # the package's


def test_the_second_backbone_is_trained_with_the_error_of_v() -> None:
    z, noise, guessed = torch.tensor([2.0]), torch.tensor([-1.0]), torch.tensor([-0.5])
    signal, sigma = torch.tensor([0.6]), torch.tensor([0.8])
    picture = (signal * z + sigma * noise - sigma * guessed) / signal
    v_error = (signal * guessed - sigma * picture) - (signal * noise - sigma * z)
    assert v_error.item() == pytest.approx(0.5 / 0.6)
    assert (weight(signal) * (guessed - noise) ** 2).item() == pytest.approx(v_error.item() ** 2)
    assert weight(torch.tensor([0.02])).item() == 25  # not 2500
