"""HPSv2 through the original package, on small random checkpoints. Run in the environment of the lock, with pytest."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from texforce_hpsv2.reward import HPSv2, HPSv21

PROMPTS = ["a red cat", "dogs on the moon, it's 1999!", "blue " * 100]
NOTHING = [{}, {}, {}]


def open_small(folder: Path, kind: type[HPSv2] = HPSv2, **options: Any) -> HPSv2:
    return kind(**{"weights": str(folder), "device": "cpu", "allow_pickle": True, **options})


def original_scores(img_score: Any, model: torch.nn.Module, weights: Path, images: Any, prompts: Any) -> list[float]:
    """What `hpsv2.score` says, its model replaced by `model`, into which it loads `weights` at each call."""
    from hpsv2.src.open_clip import image_transform

    size = model.visual.image_size
    img_score.model_dict.update(
        model=model, preprocess_val=image_transform(size, is_train=False, resize_longest_max=True)
    )
    return [float(img_score.score(image, prompt, cp=str(weights))[0]) for image, prompt in zip(images, prompts)]


@pytest.mark.parametrize(
    ("kind", "file"), [(HPSv2, "HPS_v2_compressed.pt"), (HPSv21, "HPS_v2.1_compressed.pt")], ids=["v2", "v2.1"]
)
@pytest.mark.filterwarnings("ignore:.*autocast:FutureWarning", "ignore:.*CUDA is not available:UserWarning")
def test_scores_are_those_of_the_originals_own_score_function(small, pictures, img_score, kind, file):
    import copy

    expected = original_scores(img_score, copy.deepcopy(small.model), small.folder / file, pictures, PROMPTS)
    found = open_small(small.folder, kind).score(pictures, PROMPTS, NOTHING)
    assert found == pytest.approx(expected, abs=1e-6)
    assert max(found) - min(found) > 0.01


def test_v2_and_v21_read_different_files(small, pictures):
    old, new = (open_small(small.folder, kind).score(pictures, PROMPTS, NOTHING) for kind in (HPSv2, HPSv21))
    assert max(abs(a - b) for a, b in zip(old, new)) > 0.01


def test_a_picture_of_one_zero_and_a_prompt_of_three_four_have_the_cosine_three_fifths(spoiled, pictures):
    def constant(tensors):
        for norm, values in (("visual.ln_post", [1.0, 0.0]), ("ln_final", [3.0, 4.0])):
            tensors[f"{norm}.weight"] = torch.zeros_like(tensors[f"{norm}.weight"])
            tensors[f"{norm}.bias"] = torch.zeros_like(tensors[f"{norm}.bias"])
            tensors[f"{norm}.bias"][:2] = torch.tensor(values)
        for projection in ("visual.proj", "text_projection"):
            tensors[projection] = torch.eye(*tensors[projection].shape)

    # (1, 0) . (3, 4) / 5
    assert open_small(spoiled(constant)).score(pictures, PROMPTS, NOTHING) == pytest.approx([0.6] * 3, abs=1e-6)


def test_the_size_of_a_batch_changes_no_score(small, pictures):
    whole = open_small(small.folder).score(pictures, PROMPTS, NOTHING)
    assert open_small(small.folder, batch=2).score(pictures, PROMPTS, NOTHING) == pytest.approx(whole, abs=1e-6)


def test_the_checkpoint_is_read_once(small, pictures, monkeypatch):
    reward = open_small(small.folder)
    first = reward.score(pictures, PROMPTS, NOTHING)

    def no_more(*_: Any, **__: Any) -> None:
        raise AssertionError("the checkpoint was read again")

    monkeypatch.setattr(torch, "load", no_more)
    assert reward.score(pictures, PROMPTS, NOTHING) == first


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda tensors: tensors.pop("logit_scale"), "missing logit_scale"),
        (lambda tensors: tensors.update({"extra.weight": torch.zeros(1)}), "unexpected extra.weight"),
        (lambda tensors: tensors.update({"visual.proj": torch.zeros(3, 3)}), "of another shape visual.proj"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_by_name(spoiled, change, words):
    with pytest.raises(ValueError, match=words):
        open_small(spoiled(change))


def test_without_a_configuration_only_vit_h_14_fits(small, tmp_path):
    shutil.copy(small.folder / "HPS_v2_compressed.pt", tmp_path)
    with pytest.raises(ValueError, match=r"missing .*visual.transformer.resblocks.2"):
        open_small(tmp_path)
    bare = tmp_path / "bare.json"
    bare.write_text(json.dumps(small.config), encoding="utf-8")
    open_small(tmp_path, config=str(bare))


def test_a_configuration_that_is_none_is_refused(small, tmp_path):
    path = tmp_path / "config.json"
    for text, words in (
        ("{", "is no JSON"),
        ("[]", "lacks embed_dim"),
        (json.dumps({**small.config, "speed": 1}), "can make no CLIP of this configuration"),
    ):
        path.write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=words):
            open_small(small.folder, config=str(path))
    with pytest.raises(FileNotFoundError, match=r"there is no file .*hpsv2.config"):
        open_small(small.folder, config=str(tmp_path / "none.json"))


def test_a_checkpoint_of_a_smaller_vocabulary_is_refused(small, tmp_path):
    tensors = dict(small.model.state_dict())
    tensors["token_embedding.weight"] = tensors["token_embedding.weight"][:500].clone()
    config = {**small.config, "text_cfg": {**small.config["text_cfg"], "vocab_size": 500}}
    with pytest.raises(ValueError, match="knows 500 words and hpsv2's vocabulary has 49408"):
        open_small(small.write(tmp_path, tensors, config))


def test_a_file_that_is_not_the_official_one_needs_allow_pickle(small):
    for kind, digest in ((HPSv2, "07cb0d20"), (HPSv21, "c57a38fb")):
        with pytest.raises(ValueError, match=rf"SHA-256 .* is not {digest}.*{kind.name}.allow_pickle=true"):
            open_small(small.folder, kind, allow_pickle=False)


def test_code_inside_a_checkpoint_is_not_run_even_with_allow_pickle(small, tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    folder = Path(shutil.copytree(small.folder, tmp_path / "evil"))
    (folder / "HPS_v2_compressed.pt").write_bytes(pickle.dumps({"state_dict": Evil()}, protocol=2))
    with pytest.raises(ValueError, match="damaged or holds more than tensors"):
        open_small(folder)
    assert not (tmp_path / "ran").exists()


def test_a_missing_file_names_the_repository_the_file_and_the_option(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.*hpsv2.1.weights wants 'HPS_v2.1_compressed.pt' of xswu/HPSv2"):
        open_small(tmp_path / "none", HPSv21)


def test_without_a_network_the_sentence_says_how_to_bring_the_file(monkeypatch):
    import huggingface_hub

    def offline(*_: Any, **__: Any) -> str:
        raise huggingface_hub.errors.LocalEntryNotFoundError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(FileNotFoundError, match=r"'HPS_v2_compressed.pt' of xswu/HPSv2.*hpsv2.weights=FILE"):
        HPSv2(device="cpu")


def test_an_unknown_device_and_an_empty_batch_are_refused(small):
    with pytest.raises(ValueError, match="the device 'gpu' is not available"):
        open_small(small.folder, device="gpu")
    with pytest.raises(ValueError, match="the option batch is 0"):
        open_small(small.folder, batch=0)


def test_only_the_parts_of_the_package_that_score_are_imported(small):
    code = (
        "import sys; from texforce_hpsv2.reward import HPSv2; HPSv2(sys.argv[1], device='cpu', allow_pickle=True);"
        "print(*sorted({'hpsv2', 'turtle', 'tkinter', 'clint', 'open_clip'} & set(sys.modules)))"
    )
    package = str(Path(__file__).parents[1])
    found = subprocess.run(
        [sys.executable, "-c", code, str(small.folder)],
        env={**os.environ, "PYTHONPATH": package},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == []


@pytest.mark.parametrize(("name", "kind"), [("hpsv2", HPSv2), ("hpsv2.1", HPSv21)])
def test_the_contract(small, name, kind):
    testing = pytest.importorskip("texforce_cli.testing")
    options = {"weights": str(small.folder), "device": "cpu", "allow_pickle": "true"}
    testing.check_reward("texforce_hpsv2", name, options=options)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*autocast:FutureWarning", "ignore:.*CUDA is not available:UserWarning")
def test_the_official_size_is_vit_h_14_without_any_configuration(tmp_path, pictures, img_score):
    """Random weights in half precision: 986 million, as many as the official file holds."""
    from hpsv2.src.open_clip import create_model

    torch.manual_seed(0)
    model = create_model("ViT-H-14", output_dict=True).eval()
    tensors = {name: value.half() for name, value in model.state_dict().items()}
    # the official file has 1,972,484,501 bytes: 2 a weight, and less than 1 MB for their names
    assert 0 < 1_972_484_501 - sum(2 * value.numel() for value in tensors.values()) < 2**20
    weights = tmp_path / "HPS_v2_compressed.pt"
    torch.save({"state_dict": tensors}, weights)
    del tensors
    (expected,) = original_scores(img_score, model, weights, pictures[:1], PROMPTS[:1])
    del model
    img_score.model_dict.clear()
    assert open_small(tmp_path).score(pictures[:1], PROMPTS[:1], [{}]) == pytest.approx([expected], abs=1e-5)
