"""ImageReward through the original package, on small random checkpoints. Run in the environment of the lock, with pytest."""

from __future__ import annotations

import os
import pickle
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from texforce_image_reward.reward import ImageReward

PROMPTS = ["a red cat", "dogs on the moon", "blue " * 50]
# [CLS] ... [SEP] by the places in the vocabulary of conftest.py; "dogs" is "dog" and "##s", and 35 is the most
TOKENS = [[2, 5, 6, 8, 3], [2, 9, 13, 10, 11, 12, 3], [2, *[7] * 33, 3]]
NOTHING = [{}, {}, {}]


def open_small(folder: Path, **options: Any) -> ImageReward:
    return ImageReward(**{"weights": str(folder), "device": "cpu", "allow_pickle": True, **options})


def test_scores_are_those_of_the_originals_networks_step_by_step(small, pictures):
    found = open_small(small.folder).score(pictures, PROMPTS, NOTHING)
    assert found == pytest.approx([small.score(*pair) for pair in zip(pictures, TOKENS)], abs=1e-5)
    assert max(found) - min(found) > 0.01


def test_scores_are_those_of_the_originals_own_score_method(small, pictures):
    reward = open_small(small.folder)
    alone = [reward._model.score(prompt, image) for prompt, image in zip(PROMPTS, pictures)]
    assert reward.score(pictures, PROMPTS, NOTHING) == pytest.approx(alone, abs=1e-5)


def test_a_head_that_always_says_three_gives_three_less_the_mean_over_the_deviation(spoiled, pictures):
    def three(tensors):
        tensors["mlp.layers.7.weight"] = torch.zeros(1, 16)
        tensors["mlp.layers.7.bias"] = torch.tensor([3.0])

    # (3 - 0.16717363) / 1.03333950 = 2.74142828
    assert open_small(spoiled(three)).score(pictures, PROMPTS, NOTHING) == pytest.approx([2.74142828] * 3, abs=1e-6)


def test_the_size_of_a_batch_changes_no_score(small, pictures):
    whole = open_small(small.folder).score(pictures, PROMPTS, NOTHING)
    assert open_small(small.folder, batch=2).score(pictures, PROMPTS, NOTHING) == pytest.approx(whole, abs=1e-5)


def test_both_the_picture_and_the_prompt_count(small, pictures):
    score = open_small(small.folder).score
    ((cat,), (dog,), (other,)) = (
        score(pictures[:1], ["a red cat"], [{}]),
        score(pictures[:1], ["a blue dog"], [{}]),
        score(pictures[1:2], ["a red cat"], [{}]),
    )
    assert abs(cat - dog) > 1e-4
    assert abs(cat - other) > 1e-4


def test_half_precision_in_the_file_is_scored_in_single_precision(small, spoiled, pictures):
    def halve(tensors):
        tensors.update({name: value.half() for name, value in tensors.items() if value.is_floating_point()})

    reward = open_small(spoiled(halve))
    assert {weight.dtype for weight in reward._model.parameters()} == {torch.float32}
    exact = open_small(small.folder).score(pictures, PROMPTS, NOTHING)
    assert reward.score(pictures, PROMPTS, NOTHING) == pytest.approx(exact, abs=0.02)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("blip.visual_encoder.norm.bias"), "missing blip.visual_encoder.norm.bias"),
        (lambda tensors: tensors.update({"extra.weight": torch.zeros(1)}), "unexpected extra.weight"),
        (
            lambda tensors: tensors.update({"blip.vision_proj.bias": torch.zeros(3)}),
            "of another shape blip.vision_proj.bias",
        ),
        (lambda tensors: tensors.pop("blip.visual_encoder.pos_embed"), "holds no vision transformer"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(spoiled, change, words):
    with pytest.raises(ValueError, match=words):
        open_small(spoiled(change))


def test_a_file_that_is_not_the_official_one_needs_allow_pickle(small):
    with pytest.raises(ValueError, match=r"SHA-256 .* is not d71dc8d4.*add image-reward.allow_pickle=true"):
        open_small(small.folder, allow_pickle=False)


def test_code_inside_a_checkpoint_is_not_run_even_with_allow_pickle(small, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = Path(shutil.copytree(small.folder, tmp_path / "evil"))
    (folder / "ImageReward.pt").write_bytes(pickle.dumps({"mlp": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="damaged or holds more than tensors"):
        open_small(folder)
    assert not (tmp_path / "ran").exists()


def test_three_files_in_three_places_need_no_network(small, pictures, tmp_path, monkeypatch):
    import huggingface_hub

    def no_network(*_: Any, **__: Any) -> str:
        raise AssertionError("the Hub was asked")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", no_network)
    for name in ("ImageReward.pt", "med_config.json", "vocab.txt"):
        (tmp_path / name[:3]).mkdir()
        shutil.copy(
            small.folder / name, tmp_path / name[:3] / f"my-{name}" if name != "vocab.txt" else tmp_path / "voc"
        )
    reward = open_small(
        tmp_path / "Ima" / "my-ImageReward.pt",
        med_config=str(tmp_path / "med" / "my-med_config.json"),
        tokenizer=str(tmp_path / "voc"),
    )
    assert reward.score(pictures, PROMPTS, NOTHING) == open_small(small.folder).score(pictures, PROMPTS, NOTHING)


def test_a_missing_file_names_the_repository_the_file_and_the_option(small, tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nowhere.*image-reward.weights.*'ImageReward.pt' of THUDM/ImageReward"
    ):
        open_small(tmp_path / "nowhere")
    with pytest.raises(
        FileNotFoundError, match=r"image-reward.tokenizer.*'vocab.txt' of google-bert/bert-base-uncased"
    ):
        open_small(small.folder, tokenizer=str(tmp_path))


def test_without_a_network_the_sentence_says_how_to_bring_the_file(monkeypatch):
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match=r"'ImageReward.pt' of THUDM.*image-reward.weights=FILE"):
        ImageReward(device="cpu")


def test_a_vocabulary_larger_than_the_models_is_refused(small, tmp_path):
    words = (small.folder / "vocab.txt").read_text(encoding="utf-8") + "one\ntoo\nmany\n"
    (tmp_path / "vocab.txt").write_text(words, encoding="utf-8")
    with pytest.raises(ValueError, match="a vocabulary of 19 words and the model knows 16"):
        open_small(small.folder, tokenizer=str(tmp_path))


def test_an_unknown_device_and_an_empty_batch_are_refused(small):
    with pytest.raises(ValueError, match="the device 'gpu' is not available"):
        open_small(small.folder, device="gpu")
    with pytest.raises(ValueError, match="the option batch is 0"):
        open_small(small.folder, batch=0)


def test_the_originals_training_code_is_not_imported(small):
    open_small(small.folder)
    assert "ImageReward.ImageReward" in sys.modules
    assert not {"ImageReward", "ImageReward.ReFL", "diffusers", "datasets", "clip"} & set(sys.modules)


def test_the_contract(small):
    testing = pytest.importorskip("texforce_cli.testing")
    options = {"weights": str(small.folder), "device": "cpu", "allow_pickle": "true"}
    testing.check_reward("texforce_image_reward", "image-reward", options=options)


@pytest.mark.slow
def test_the_official_sizes_are_made_by_the_originals_own_constructor(tmp_path, pictures, monkeypatch):
    """ViT-L and BERT-base, random weights in half precision: 447 million, as many as the official file holds."""
    import json

    from texforce_image_reward import reward

    words = tmp_path / "vocab.txt"
    words.write_text("\n".join([*(f"w{i}" for i in range(30517)), *("[PAD] [UNK] [CLS] [SEP] [MASK]".split())]))
    config = {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12, "num_hidden_layers": 12}
    config |= {"vocab_size": 30524, "max_position_embeddings": 512, "encoder_width": 1024, "add_cross_attention": True}
    (tmp_path / "med_config.json").write_text(json.dumps(config))
    original = reward._import_original()
    torch.manual_seed(0)
    with reward._instead({"BertTokenizer": reward._Vocabulary(words)}):
        model = original.ImageReward(med_config=str(tmp_path / "med_config.json")).eval()
    # the official file has 1,786,880,927 bytes: 4 a weight, 8 a position, and less than 1 MB for their names
    stored = sum(value.numel() * value.element_size() for value in model.state_dict().values())
    assert 0 < 1_786_880_927 - stored < 2**20
    torch.save(model.half().state_dict(), tmp_path / "ImageReward.pt")

    def never(*_: Any) -> None:
        raise AssertionError("the original's own ViT-L was replaced")

    monkeypatch.setattr(reward._Vit, "__call__", never)
    loaded = open_small(tmp_path)
    expected = [model.float().score("w7 w8", image) for image in pictures[:2]]
    assert loaded.score(pictures[:2], ["w7 w8"] * 2, NOTHING[:2]) == pytest.approx(expected, abs=1e-4)
