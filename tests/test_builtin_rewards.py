"""The rewards on CLIP and BLIP and the table of scores: numbers by hand, strictness, and what is refused."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.files import sha256
from texforce_cli.rewards import environments, weights
from texforce_cli.rewards.builtin import hps
from texforce_cli.rewards.builtin.clip import Aesthetic, ClipScore, PickScore
from texforce_cli.rewards.builtin.hps import Fit, Hpsv2, Hpsv21
from texforce_cli.rewards.builtin.image_reward import ImageReward
from texforce_cli.rewards.builtin.scores_file import ScoresFile, picture_hash
from texforce_cli.rewards.builtin.vision import Crop, Head, PictureReward
from texforce_cli.rewards.registry import load_registry
from texforce_cli.rewards.terms import RewardSet, parse_terms
from texforce_cli.testing import check_reward
from texforce_cli.testing import pictures as contract_pictures
from tools import reward_weights

Tensors = dict[str, torch.Tensor]
COLOURS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a cat", "a red dog in the park", "two foxes", "a cat", "a green apple on the beach"]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `python -m tools.reward_weights` writes."""
    folder = tmp_path_factory.mktemp("made")
    sys.argv, kept = ["reward_weights", str(folder)], sys.argv
    try:
        reward_weights.main()
    finally:
        sys.argv = kept
    return folder


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TEXFORCE_HOME", str(tmp_path / "home"))
    return tmp_path / "home"


def every(made: Path) -> dict[str, PictureReward]:
    clip, pickles = str(made / "clip"), {"allow_pickle": True}
    return {
        "clip-score": ClipScore(clip),
        "pickscore": PickScore(clip),
        "aesthetic": Aesthetic(str(made / "aesthetic"), clip, **pickles),
        "hpsv2": Hpsv2(str(made / "hpsv2"), **pickles),
        "hpsv2.1": Hpsv21(str(made / "hpsv2"), **pickles),
        "image-reward": ImageReward(str(made / "image-reward"), **pickles),
    }


def pictures(count: int, height: int = 48, width: int = 48, seed: int = 0) -> list[Image.Image]:
    """Blurred colours, as pictures rather are than noise."""
    grain = np.random.default_rng(seed).integers(0, 256, (count, 6, 6, 3), dtype=np.uint8)
    return [Image.fromarray(image).resize((width, height), Image.Resampling.BICUBIC) for image in grain]


def as_tensors(images: list[Image.Image]) -> torch.Tensor:
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 255


def edited(path: Path, target: Path, change: Callable[[Tensors], None]) -> Path:
    """A checkpoint with its neighbours in the folder `target`, its tensors changed."""
    target.mkdir(parents=True, exist_ok=True)
    for neighbour in path.parent.iterdir():
        (target / neighbour.name).write_bytes(neighbour.read_bytes())
    if path.suffix == ".safetensors":
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, target / path.name, {"format": "pt"})
    else:
        data = torch.load(path, weights_only=True)
        change(data.get("state_dict", data))
        torch.save(data, target / path.name)
    return target


# numbers by hand


def two_dimensions(picture: tuple[float, float], prompt: tuple[float, float]) -> Callable[[Tensors], None]:
    """Make every picture and every prompt of a CLIP model the same two numbers: a normalisation whose weight is 0 leaves
    its bias, (1, 0, 0, ...), of which the projection takes its first column."""

    def change(tensors: Tensors) -> None:
        for last, projection, numbers in (
            ("vision_model.post_layernorm", "visual_projection", picture),
            ("text_model.final_layer_norm", "text_projection", prompt),
        ):
            tensors[f"{last}.weight"].zero_()
            tensors[f"{last}.bias"].zero_()[0] = 1
            tensors[f"{projection}.weight"].zero_()[:2, 0] = torch.tensor(numbers)

    return change


def test_clip_score_is_two_and_a_half_cosines_and_never_negative(made: Path, tmp_path: Path) -> None:
    checkpoint = made / "clip" / "model.safetensors"
    near = edited(checkpoint, tmp_path / "near", two_dimensions((3, 4), (10, 0)))  # cosine 3/5
    far = edited(checkpoint, tmp_path / "far", two_dimensions((3, 4), (-10, 0)))
    assert ClipScore(str(near)).score(pictures(2), ["a", "b"], [{}, {}]) == pytest.approx([1.5, 1.5])
    assert ClipScore(str(far)).score(pictures(1), ["a"], [{}]) == [0.0]


def test_clip_score_puts_its_prefix_before_the_prompt(made: Path) -> None:
    folder, image = str(made / "clip"), pictures(1)
    written = ClipScore(folder, prefix="").score(image, ["A photo depicts a cat"], [{}])
    assert ClipScore(folder).score(image, ["a cat"], [{}]) == written
    assert ClipScore(folder, prefix="").score(image, ["a cat"], [{}]) != written


def test_pickscore_is_the_cosine_times_the_logit_scale(made: Path, tmp_path: Path) -> None:
    folder = edited(made / "clip" / "model.safetensors", tmp_path / "x", two_dimensions((3, 4), (0, 1)))
    assert PickScore(str(folder)).score(pictures(1), ["a"], [{}]) == pytest.approx([100 * 0.8])  # exp(log 100) * 4/5


def test_the_aesthetic_score_is_linear_layers_on_the_unit_embedding(made: Path, tmp_path: Path) -> None:
    folder = edited(made / "clip" / "model.safetensors", tmp_path / "clip", two_dimensions((3, 4), (1, 0)))
    rows = [[2.0, 1.0] + 46 * [0.0], [0.0, 1.0] + 46 * [0.0]]
    tensors = {"layers.0.weight": torch.tensor(rows), "layers.0.bias": torch.tensor([0.5, 0.0])}
    tensors |= {"layers.10.weight": torch.tensor([[1.0, 10.0]]), "layers.10.bias": torch.tensor([-1.0])}
    torch.save(tensors, tmp_path / "sac+logos+ava1-l14-linearMSE.pth")
    reward = Aesthetic(str(tmp_path), str(folder), allow_pickle=True)
    # (0.6, 0.8) -> (2 * 0.6 + 0.8 + 0.5, 0.8) = (2.5, 0.8) -> 2.5 + 8 - 1
    assert reward.score(pictures(1), ["whatever"], [{}]) == pytest.approx([9.5])


def test_hpsv2_is_the_bare_cosine(made: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        for last, projection, numbers in (
            ("visual.ln_post", "visual.proj", (3, 4)),
            ("ln_final", "text_projection", (5, 0)),
        ):
            tensors[f"{last}.weight"].zero_()
            tensors[f"{last}.bias"].zero_()[0] = 1
            tensors[projection].zero_()[0, :2] = torch.tensor(numbers)  # [inputs, outputs], unlike transformers

    folder = edited(made / "hpsv2" / "HPS_v2_compressed.pt", tmp_path / "x", change)
    assert Hpsv2(str(folder), allow_pickle=True).score(pictures(1), ["a"], [{}]) == pytest.approx([0.6])


def test_image_reward_is_in_deviations_from_the_mean_of_the_authors(made: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["mlp.layers.7.weight"].zero_()
        tensors["mlp.layers.7.bias"].fill_(0.16717362830052426 + 2 * 1.0333394966054072)

    folder = edited(made / "image-reward" / "ImageReward.pt", tmp_path / "x", change)
    assert ImageReward(str(folder), allow_pickle=True).score(pictures(1), ["a"], [{}]) == pytest.approx([2.0])


def test_the_crop_is_the_middle_of_the_scaled_picture_and_is_normalised() -> None:
    image = np.zeros((2, 4, 3), np.uint8)
    image[:, 1], image[:, 2] = 255, 51
    reading = Crop(2, mean=(0.5, 0.5, 0.2), std=(0.5, 0.25, 0.2))
    expected = torch.tensor([[[1.0, -0.6]] * 2, [[2.0, -1.2]] * 2, [[4.0, 0.0]] * 2])
    torch.testing.assert_close(reading.picture(Image.fromarray(image)), expected)
    torch.testing.assert_close(reading.tensor(as_tensors([Image.fromarray(image)]))[0], expected)


@pytest.mark.parametrize(("height", "width"), [(48, 48), (40, 90), (97, 50), (300, 20), (24, 24)])
def test_pictures_are_read_as_transformers_reads_them(height: int, width: int) -> None:
    image = pictures(1, height, width)[0]
    theirs = CLIPImageProcessorPil(size={"shortest_edge": 24}, crop_size={"height": 24, "width": 24})
    expected = torch.as_tensor(np.asarray(theirs(image)["pixel_values"]))[0]
    torch.testing.assert_close(Crop(24).picture(image), expected)


@pytest.mark.parametrize(("height", "width"), [(64, 64), (512, 512), (100, 160)])
def test_torch_resizes_as_pillow_does_up_to_a_rounding_of_a_few_pixels(height: int, width: int) -> None:
    images = pictures(4, height, width)
    reading = Crop(224, mean=(0, 0, 0), std=(1, 1, 1))
    off = 255 * (reading.tensor(as_tensors(images)) - torch.stack([reading.picture(image) for image in images])).abs()
    assert off.max() < 2.01
    assert off.mean() < 0.05  # without the two roundings it is 0.25


def test_hpsv2_sees_the_whole_picture_between_black_bars() -> None:
    image = np.full((4, 2, 3), 255, np.uint8)
    seen = Fit(4).picture(Image.fromarray(image))
    black, white = (torch.tensor([(value - m) / s for m, s in zip(*COLOURS)]) for value in (0, 1))
    for column, colour in enumerate((black, white, white, black)):
        torch.testing.assert_close(seen[:, :, column], colour[:, None].expand(3, 4))
    assert Fit(4).picture(Image.fromarray(np.zeros((9, 5, 3), np.uint8))).shape == (3, 4, 4)


def test_the_renamed_tensors_of_open_clip_give_the_embeddings_of_open_clip(made: Path) -> None:
    """Against open_clip's forward pass, written down here with torch.nn.MultiheadAttention, on its own tensors."""
    state = torch.load(made / "hpsv2" / "HPS_v2_compressed.pt", weights_only=True)["state_dict"]
    state = {name: value.float() for name, value in state.items()}

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def transformer(x: torch.Tensor, prefix: str, heads: int, mask: torch.Tensor | None) -> torch.Tensor:
        for block in (f"{prefix}.{i}" for i in range(2)):
            attention = torch.nn.MultiheadAttention(x.shape[-1], heads, batch_first=True)
            attention.load_state_dict(
                {n.removeprefix(f"{block}.attn."): v for n, v in state.items() if n.startswith(f"{block}.attn.")}
            )
            y = norm(x, f"{block}.ln_1")
            x = x + attention(y, y, y, need_weights=False, attn_mask=mask)[0]
            y = F.linear(norm(x, f"{block}.ln_2"), state[f"{block}.mlp.c_fc.weight"], state[f"{block}.mlp.c_fc.bias"])
            x = x + F.linear(F.gelu(y), state[f"{block}.mlp.c_proj.weight"], state[f"{block}.mlp.c_proj.bias"])
        return x

    reward = Hpsv2(str(made / "hpsv2"), allow_pickle=True)
    pixels = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(0))
    patches = F.conv2d(pixels, state["visual.conv1.weight"], stride=14).flatten(2).transpose(1, 2)
    x = torch.cat([state["visual.class_embedding"].expand(2, 1, -1), patches], 1) + state["visual.positional_embedding"]
    x = transformer(norm(x, "visual.ln_pre"), "visual.transformer.resblocks", 2, None)
    seen = F.normalize(norm(x[:, 0], "visual.ln_post") @ state["visual.proj"], dim=-1)
    ids = torch.tensor([[844, 7, 9, 845] + 73 * [0], [844, 11, 845] + 74 * [0]])  # padded with 0, as open_clip pads
    x = state["token_embedding.weight"][ids] + state["positional_embedding"]
    x = transformer(x, "transformer.resblocks", 4, torch.full((77, 77), -math.inf).triu(1))
    read = F.normalize(norm(x, "ln_final")[[0, 1], ids.argmax(-1)] @ state["text_projection"], dim=-1)
    with torch.no_grad():
        torch.testing.assert_close(reward.embed_images(pixels), seen, atol=1e-5, rtol=0)
        ours = reward._model.get_text_features(input_ids=ids).pooler_output
        torch.testing.assert_close(F.normalize(ours, dim=-1), read, atol=1e-5, rtol=0)


# what holds for all of them


def test_score_and_score_tensor_agree_and_the_gradient_reaches_the_picture(made: Path) -> None:
    images = pictures(5, 96, 64)
    for name, reward in every(made).items():
        scores = torch.tensor(reward.score(images, PROMPTS, [{}] * 5))
        given = as_tensors(images).requires_grad_()
        values = reward.score_tensor(given, PROMPTS)
        # of the spread of the scores; HPSv2 resizes the same way in both
        torch.testing.assert_close(values.detach(), scores, atol=0.01 * float(scores.std()), rtol=0, msg=name)
        values.sum().backward()
        assert given.grad is not None
        reached = given.grad.abs().amax((1, 2, 3)) > 0
        assert reached.tolist() == [name != "clip-score" or score > 0 for score in scores.tolist()], name


def test_neither_order_nor_batches_change_a_score(made: Path) -> None:
    images = pictures(5) + pictures(1, 30, 70)
    prompts = [*PROMPTS, "a whale"]
    for name, reward in every(made).items():
        scores = reward.score(images, prompts, [{}] * 6)
        assert len(set(scores)) > 3, name
        backwards = reward.score(images[::-1], prompts[::-1], [{}] * 6)
        assert backwards[::-1] == pytest.approx(scores, abs=2e-5), name
        reward._batch = 2
        assert reward.score(images, prompts, [{}] * 6) == pytest.approx(scores, abs=2e-5), name
        one = [reward.score([image], [prompt], [{}])[0] for image, prompt in zip(images, prompts)]
        assert one == pytest.approx(scores, abs=2e-5), name


def test_a_prompt_is_cut_where_the_model_ends(made: Path) -> None:
    long = "a red cat and a blue dog and " * 20
    for name, reward in every(made).items():
        cut, longer = (reward.score(pictures(1), [text], [{}])[0] for text in (long, long + "a green whale"))
        assert cut == pytest.approx(longer, abs=1e-5), name
    short = every(made)["image-reward"]
    assert short.score(pictures(1), ["a cat"], [{}]) != pytest.approx(short.score(pictures(1), ["a dog"], [{}]))


def test_the_lines_that_the_tool_prints_work(made: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    sys.argv, kept = ["reward_weights", str(tmp_path / "again")], sys.argv
    try:
        reward_weights.main()
    finally:
        sys.argv = kept
    words = capsys.readouterr().out.split()
    names, options = (
        [value for flag, value in itertools.pairwise(words) if flag == wanted]
        for wanted in ("--reward", "--reward-option")
    )
    assert len(names) == 7
    images = np.stack([np.asarray(image) for image in pictures(2)])
    found = RewardSet(parse_terms(names, options), load_registry()).score(images, ["a cat", "a dog"], [{}, {}])
    assert set(found) == set(names)
    assert load_registry().find("image-reward").differentiable


@pytest.mark.parametrize("name", sorted(environments.built_in_names()))
def test_every_built_in_reward_passes_the_test_for_authors_of_plugins(made: Path, tmp_path: Path, name: str) -> None:
    clip, pickles = str(made / "clip"), {"allow_pickle": "true"}
    rows = [(picture_hash(image), i) for i, image in enumerate(contract_pictures())]
    options = {
        "clip-score": {"weights": clip},
        "pickscore": {"weights": clip},
        "aesthetic": {"weights": str(made / "aesthetic"), "clip": clip, **pickles},
        "hpsv2": {"weights": str(made / "hpsv2"), **pickles},
        "hpsv2.1": {"weights": str(made / "hpsv2"), **pickles},
        "image-reward": {"weights": str(made / "image-reward"), **pickles},
        "scores-file": {"path": table(tmp_path, "csv", rows)},
    }
    check_reward("texforce_cli.rewards.builtin", name, options=options.get(name), tolerance=2e-5)


def test_the_registering_module_imports_nothing_heavy() -> None:
    check = (
        "import sys, texforce_cli.rewards.builtin;"
        "print({'torch', 'transformers', 'numpy', 'PIL', 'safetensors'} & set(sys.modules))"
    )
    said = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True).stdout
    assert said.strip() == "set()"


@pytest.mark.parametrize(
    ("options", "sentence"), [({"batch": 0}, "batch is 0"), ({"device": "abacus"}, "device 'abacus' is not available")]
)
def test_bad_options_are_named(made: Path, options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UsageError, match=sentence):
        ClipScore(str(made / "clip"), **options)


# weights


CHECKPOINTS: dict[str, tuple[str, str, type[PictureReward]]] = {
    "clip": ("clip/model.safetensors", "text_model.final_layer_norm.bias", PickScore),
    "hps": ("hpsv2/HPS_v2_compressed.pt", "ln_final.bias", Hpsv2),
    "blip": ("image-reward/ImageReward.pt", "blip.text_encoder.encoder.layer.1.output.LayerNorm.bias", ImageReward),
    "head": ("image-reward/ImageReward.pt", "mlp.layers.7.bias", ImageReward),
    "linear": ("aesthetic/sac+logos+ava1-l14-linearMSE.pth", "layers.4.bias", Aesthetic),
}


def without(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def one_longer(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.cat([tensors[name], tensors[name][:1]])})


def with_more(tensors: Tensors) -> None:
    tensors["ema.decay"] = torch.ones(1)


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("fault", ["missing", "unexpected", "of another shape"])
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(made: Path, tmp_path: Path, kind: str, fault: str) -> None:
    file, tensor, reward = CHECKPOINTS[kind]
    change = {"missing": without(tensor), "unexpected": with_more, "of another shape": one_longer(tensor)}[fault]
    folder = edited(made / file, tmp_path / "x", change)
    wanted = "ema.decay" if fault == "unexpected" else tensor.rpartition(".")[2]
    more = {"clip": str(made / "clip")} if reward is Aesthetic else {}
    with pytest.raises(
        TexforceError, match=rf"'{Path(file).name}' does not fit.*{fault} \S*{wanted}".replace("+", r"\+")
    ):
        reward(weights=str(folder), allow_pickle=True, **more)  # type: ignore[call-arg]


def test_the_first_three_are_named_and_the_rest_counted(tmp_path: Path) -> None:
    tensors = {f"extra{i}": torch.ones(1) for i in range(5)}
    with pytest.raises(
        TexforceError, match="missing weight, bias; unexpected extra0, extra1, extra2 and 2 more; get the"
    ):
        weights.load_strictly(torch.nn.Linear(1, 1), tensors, tmp_path / "x.pt")


def test_another_kind_of_checkpoint_is_named(made: Path) -> None:
    with pytest.raises(TexforceError, match=r"'ImageReward.pt' holds no 'visual.conv1.weight'"):
        Hpsv2(str(made / "image-reward" / "ImageReward.pt"), allow_pickle=True)
    with pytest.raises(TexforceError, match=r"does not fit ImageReward: unexpected positional_embedding"):
        ImageReward(str(made / "hpsv2" / "HPS_v2_compressed.pt"), allow_pickle=True)
    with pytest.raises(TexforceError, match=r"holds no 'layers.0.weight'"):
        Aesthetic(str(made / "image-reward" / "ImageReward.pt"), str(made / "clip"), allow_pickle=True)


def test_positions_that_older_versions_saved_are_passed_over(made: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["text_model.embeddings.position_ids"] = torch.arange(32)[None]

    folder = edited(made / "clip" / "model.safetensors", tmp_path / "x", change)
    score = PickScore(str(made / "clip")).score(pictures(1), ["a"], [{}])
    assert PickScore(str(folder)).score(pictures(1), ["a"], [{}]) == score


def test_a_pickle_is_refused_unless_its_digest_is_known_or_it_is_allowed(made: Path) -> None:
    path = made / "hpsv2" / "HPS_v2.1_compressed.pt"
    with pytest.raises(
        TexforceError, match=r"is a pickle and its SHA-256 \w{64} is not c57a.*hpsv2.1.allow_pickle=true"
    ):
        Hpsv21(str(path))
    with pytest.raises(TexforceError, match=r"no SHA-256 of the official file is known.*x.allow_pickle=true"):
        weights.read_tensors(path, "x")
    assert (
        weights.read_tensors(path, "x", known=sha256(path)).keys()
        == weights.read_tensors(path, "x", allow_pickle=True).keys()
    )


def test_a_pickle_is_converted_once(made: Path, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = made / "image-reward" / "ImageReward.pt"
    first = weights.read_tensors(path, "x", allow_pickle=True)
    assert [file.name for file in (home / "cache" / "weights").iterdir()] == [f"{sha256(path)}.safetensors"]
    monkeypatch.setattr(torch, "load", lambda *_, **__: pytest.fail("read again"))
    second = weights.read_tensors(path, "x", allow_pickle=True)
    assert first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_a_disk_that_is_full_for_the_cache_costs_time_only(made: Path, home: Path) -> None:
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, hard))
    try:
        assert weights.read_tensors(made / "image-reward" / "ImageReward.pt", "x", allow_pickle=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((home / "cache" / "weights").glob("*"))


def test_a_cache_that_cannot_be_written_costs_time_only(made: Path, home: Path) -> None:
    home.write_text("a file where a folder should be")
    assert weights.read_tensors(made / "image-reward" / "ImageReward.pt", "x", allow_pickle=True)


class Trap:
    """What a hostile file would hold."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (Path("sprung"),)


def test_an_allowed_pickle_still_runs_no_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": {"x": Trap()}}, tmp_path / "trap.pt")
    with pytest.raises(TexforceError, match=r"'trap.pt' is damaged or holds more than tensors"):
        weights.read_tensors(tmp_path / "trap.pt", "x", allow_pickle=True)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize(
    ("content", "sentence"),
    [(b"", "is damaged or holds more"), (b"PK\x03\x04 half a file", "is damaged or holds more"), (None, "is no table")],
)
def test_a_damaged_checkpoint_is_named(tmp_path: Path, content: bytes | None, sentence: str) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(content) if content is not None else torch.save([1, 2], path)
    with pytest.raises(TexforceError, match=f"'x.pt' {sentence}"):
        weights.read_tensors(path, "x", allow_pickle=True)
    (tmp_path / "x.safetensors").write_bytes(content or b"no")
    with pytest.raises(TexforceError, match=r"x.safetensors' is damaged"):
        weights.read_tensors(tmp_path / "x.safetensors", "x")


def test_a_file_that_is_not_there_is_named_with_its_repository_and_option(tmp_path: Path) -> None:
    for given in (tmp_path, tmp_path / "gone.pt"):
        with pytest.raises(TexforceError) as caught:
            Hpsv2(str(given))
        for word in (
            str(given),
            "HPS_v2_compressed.pt",
            "xswu/HPSv2@697403c78157",
            "--reward-option hpsv2.weights=PATH",
        ):
            assert word in str(caught.value)
    with pytest.raises(TexforceError, match=r"image-reward.tokenizer=PATH wants 'vocab.txt' of google-bert/x@1"):
        weights.locate(weights.Published("google-bert/x", "1", "vocab.txt"), str(tmp_path), "image-reward.tokenizer")


def test_offline_says_what_to_fetch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(TexforceError) as caught:
        ImageReward()
    for words in (
        "'ImageReward.pt' of THUDM/ImageReward@5736be03b265 is not on this machine and HF_HUB_OFFLINE is set",
        "`hf download THUDM/ImageReward ImageReward.pt --revision 5736be03b2652728fb87788c9797b0570450ab72`",
        "--reward-option image-reward.weights=PATH",
    ):
        assert words in str(caught.value)


def test_small_hps_weights_need_open_clips_configuration(made: Path, tmp_path: Path) -> None:
    folder = edited(made / "hpsv2" / "HPS_v2_compressed.pt", tmp_path / "x", lambda tensors: None)
    (folder / "open_clip_config.json").unlink()
    with pytest.raises(TexforceError, match=r"is not ViT-H-14.*open_clip_config.json"):
        Hpsv2(str(folder), allow_pickle=True)


def test_what_does_not_belong_together_is_refused(made: Path, tmp_path: Path) -> None:
    def change(tensors: Tensors) -> None:
        tensors["layers.0.weight"] = torch.ones(1024, 47)

    folder = edited(made / "aesthetic" / "sac+logos+ava1-l14-linearMSE.pth", tmp_path / "x", change)
    with pytest.raises(
        TexforceError, match=r"sits on embeddings of 47 numbers, and this CLIP makes 48.*aesthetic.clip="
    ):
        Aesthetic(str(folder), str(made / "clip"), allow_pickle=True)
    (tmp_path / "vocab.txt").write_text("\n".join(map(str, range(1000))))
    with pytest.raises(
        TexforceError, match=r"lists 1000 words, and the model knows \d+; .*image-reward.tokenizer=FILE"
    ):
        ImageReward(str(made / "image-reward"), tokenizer=str(tmp_path), allow_pickle=True)
    for file in ("merges.txt", "vocab.json"):
        (tmp_path / file).write_text("{}" if file == "vocab.json" else "#version: 0.2\n")
    with pytest.raises(TexforceError, match=r"no file .*merges.txt"):
        PickScore(str(made / "clip"), tokenizer=str(made))


def test_a_head_takes_its_layers_in_the_order_of_their_numbers() -> None:
    head = Head({"layers.10.weight": torch.ones(1, 2), "layers.2.weight": torch.ones(2, 3)})
    assert [(layer.in_features, layer.out_features) for layer in head.layers.values()] == [(3, 2), (2, 1)]
    assert hps._renamed({"ln_final.weight": torch.ones(1)}).keys() == {"text_model.final_layer_norm.weight"}


# a table of scores


def test_the_hash_of_a_picture_is_of_its_size_and_pixels() -> None:
    image = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert picture_hash(image) == hashlib.sha256(b"4x2\n" + bytes(range(24))).hexdigest()
    assert picture_hash(Image.fromarray(image)) == picture_hash(image) == picture_hash(image.copy(order="F"))
    assert picture_hash(image.reshape(4, 2, 3)) != picture_hash(image)
    with pytest.raises(ValueError, match="uint8"):
        picture_hash(image.astype(np.float32))  # type: ignore[arg-type]


def table(folder: Path, kind: str, rows: list[tuple[str, object]]) -> str:
    objects = [{"picture": name, "score": score, "who": "a person"} for name, score in rows]
    text = {
        "csv": "\ufeffpicture,who,score\n" + "".join(f"{name},a person,{score}\n" for name, score in rows),
        "jsonl": "".join(json.dumps(row) + "\n" for row in objects) + "\n",
        "list.json": json.dumps(objects),
        "object.json": json.dumps(dict(rows)),
    }[kind]
    path = folder / f"scores.{kind}"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("kind", ["csv", "jsonl", "list.json", "object.json"])
def test_every_form_of_table_is_read(tmp_path: Path, kind: str) -> None:
    images = np.stack([np.asarray(image) for image in pictures(3)])
    path = table(tmp_path, kind, [(picture_hash(image), score) for image, score in zip(images, (1.5, -2, 0))])
    assert ScoresFile(path).score(images[::-1], ["a"] * 3, [{}] * 3) == [0, -2, 1.5]


def test_a_picture_that_is_not_in_the_table_is_an_error_or_worth_what_is_said(tmp_path: Path) -> None:
    images = np.stack([np.asarray(image) for image in pictures(2)])
    path = table(tmp_path, "csv", [(picture_hash(images[0]), 3)])
    with pytest.raises(TexforceError, match=f"'scores.csv' has no score for the picture {picture_hash(images[1])}"):
        ScoresFile(path).score(images, ["a", "b"], [{}, {}])
    reward = ScoresFile(path, missing="-1")
    assert reward.score(images, ["a", "b"], [{}, {}]) == [3, -1]
    assert reward.counts == {"pictures_not_in_the_table": 1}


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("x.txt", "", "'x.txt' is no table of scores; give a file that ends in .csv"),
        ("x.csv", None, "cannot be read"),
        ("x.csv", "image,score\na,1\n", r"no table of scores \(KeyError: 'picture'\)"),
        ("x.json", "{", "no table of scores"),
        ("x.json", "[1]", "no table of scores"),
        ("x.json", '{"cat.png": 1}', "row 1 of 'x.json' names the picture 'cat.png'; name it by its picture_hash"),
        ("x.csv", f"picture,score\n{'a' * 64},good\n", "row 1 of 'x.csv' says 'good', which is no finite number"),
        ("x.csv", f"picture,score\n{'a' * 64},nan\n", "row 1 of 'x.csv' says 'nan'"),
        ("x.csv", f"picture,score\n{'a' * 64},1\n{'a' * 64},2\n", "row 2 of 'x.csv' gives a second score"),
    ],
)
def test_a_bad_table_is_named(tmp_path: Path, name: str, text: str | None, sentence: str) -> None:
    if text is not None:
        (tmp_path / name).write_text(text)
    with pytest.raises(TexforceError, match=sentence):
        ScoresFile(str(tmp_path / name))


def test_the_options_of_the_table_are_checked(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"has no table; give one: --reward-option scores-file.path=FILE"):
        ScoresFile()
    with pytest.raises(UsageError, match=r"option scores-file.missing says 'zero'"):
        ScoresFile(table(tmp_path, "csv", []), missing="zero")
