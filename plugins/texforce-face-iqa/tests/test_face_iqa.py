"""Needs an environment made from texforce_face_iqa/locks/cpu.txt; weights are random, in the official formats.

The face detector is no trained one: its last layer is set so that it sees a face of 256 pixels around every 32nd pixel
(`seeing`), or nowhere (`blind`). Everything around it, alignment and TOPIQ included, is what really runs.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from texforce_face_iqa import metrics, weights
from texforce_face_iqa.reward import FaceIQA

CPU = torch.device("cpu")
TEMPLATE = [(-63, -16), (63, -16), (0.6, 58), (-55, 115), (57, 115)]
"""Eyes, nose and corners of the mouth from the middle, about as in an aligned face of 512 pixels."""


def noise(seed: int, size: int = 512) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8))


def score(reward: FaceIQA, *pictures: Image.Image) -> list[float]:
    scores: list[float] = reward.score(pictures, [""] * len(pictures), [{} for _ in pictures])
    return scores


def detector_weights(sees: bool) -> dict[str, torch.Tensor]:
    from facexlib.detection.retinaface import RetinaFace

    torch.manual_seed(1)
    tensors = RetinaFace("resnet50", device=CPU).state_dict()
    for name, value in tensors.items():
        if "Head" in name:  # the same answer for every cell: the picture plays no part
            value.zero_()
        if "ClassHead" in name and name.endswith("bias"):  # (no face, face) for the two boxes of a cell
            value.copy_(torch.tensor([10.0, -10.0, 10.0, -10.0]))
    if sees:  # the smaller box of the coarsest grid; a landmark is in tenths of the box's side
        tensors["ClassHead.2.conv1x1.bias"].copy_(torch.tensor([-10.0, 10.0, 10.0, -10.0]))
        half = torch.tensor(TEMPLATE).flatten() / 2
        tensors["LandmarkHead.2.conv1x1.bias"][:10] = half / (0.1 * 256)
    return {f"module.{name}": value for name, value in tensors.items()}  # as in facexlib's file


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """topiq.pth, seeing.pth and blind.pth."""
    from pyiqa.models.inference_model import InferenceModel

    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    made = InferenceModel("topiq_nr-face", device=CPU, model_name="", pretrained=False, backbone_pretrain=False)
    torch.save({"params": made.net.state_dict()}, folder / "topiq.pth")
    torch.save(detector_weights(sees=True), folder / "seeing.pth")
    torch.save(detector_weights(sees=False), folder / "blind.pth")
    return folder


@pytest.fixture(scope="module")
def seeing(folder: Path) -> FaceIQA:
    return make(folder, "seeing")


def make(folder: Path, sight: str, **options: Any) -> FaceIQA:
    files = {"weights": str(folder / "topiq.pth"), "detector": str(folder / f"{sight}.pth")}
    return FaceIQA(**{**files, "device": "cpu", "allow_pickle": True, **options})


# faces ----------------------------------------------------------------------------------------------------------------

_BY_PYIQA = """
import json, sys
from pathlib import Path
from texforce_face_iqa import metrics  # torchvision
import numpy as np, torch, pyiqa
from PIL import Image
metric = pyiqa.create_metric("topiq_nr-face", device=torch.device("cpu"), backbone_pretrain=False)
pictures = [torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)[None].float() / 255 for file in sys.argv[1:]]
print(json.dumps([float(metric(picture)) for picture in pictures]))
"""


def test_the_scores_are_those_of_pyiqa_on_the_same_weights(seeing: FaceIQA, folder: Path, tmp_path: Path) -> None:
    from facexlib.parsing.parsenet import ParseNet

    cache = tmp_path / "hub" / "pyiqa"
    cache.mkdir(parents=True)
    (cache / "topiq_nr_cgfiqa_res50-0a8b8e4f.pth").symlink_to(folder / "topiq.pth")
    (cache / "detection_Resnet50_Final.pth").symlink_to(folder / "seeing.pth")
    torch.save(ParseNet(in_size=512, out_size=512, parsing_ch=19).state_dict(), cache / "parsing_parsenet.pth")
    pictures = [noise(0), noise(1, 384)]
    files = [str(tmp_path / f"{i}.png") for i in range(len(pictures))]
    for picture, file in zip(pictures, files, strict=True):
        picture.save(file)
    environment = {**os.environ, "TORCH_HOME": str(tmp_path), "CUDA_VISIBLE_DEVICES": ""}
    run = [sys.executable, "-c", _BY_PYIQA, *files]
    told = subprocess.run(run, env=environment, capture_output=True, text=True, check=True).stdout
    ours = score(seeing, *pictures)
    assert ours[0] != ours[1]
    assert ours == json.loads(told.splitlines()[-1])


def test_only_the_face_counts_and_not_what_is_around_it(seeing: FaceIQA) -> None:
    # of the faces that suppression leaves, the nearest to the middle is the square of 256 pixels around (208, 272)
    picture = np.array(noise(2))
    around, inside = picture.copy(), picture.copy()
    around[:140], around[404:], around[:, :76], around[:, 340:] = 0, 0, 0, 0
    inside[250:300, 180:230] = 0
    before, other_ground, other_face = score(seeing, *map(Image.fromarray, (picture, around, inside)))
    assert other_ground == before
    assert other_face != before


def test_a_picture_without_a_face_gets_the_stated_score_and_is_counted(folder: Path) -> None:
    reward = make(folder, "blind", no_face=-2.5)
    assert score(reward, noise(0, 96), noise(1, 96)) == [-2.5, -2.5]
    assert score(reward, noise(2, 96)) == [-2.5]
    assert reward.counts == {"no face": 3, "pictures": 3}


def test_no_face_is_0_where_nothing_is_said(folder: Path) -> None:
    assert score(make(folder, "blind"), noise(0, 96)) == [0.0]


def test_a_face_is_not_counted_as_none(folder: Path) -> None:
    reward = make(folder, "seeing")
    assert score(reward, noise(0)) != [0.0]
    assert reward.counts == {"no face": 0, "pictures": 1}


def test_an_assertion_that_is_not_about_faces_is_not_swallowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reward = make(folder, "blind")
    monkeypatch.setattr(reward._metric, "check_input_range", True)
    monkeypatch.setattr(reward._metric, "eps", -2.0)  # no picture is in the range [2, -1]
    with pytest.raises(AssertionError, match="Input must be normalized"):
        score(reward, noise(0, 96))


# other metrics --------------------------------------------------------------------------------------------------------


def test_entropy_is_that_of_the_histogram() -> None:
    reward = FaceIQA(metric="entropy", device="cpu")
    grey, halves = np.full((8, 8, 3), 128, np.uint8), np.zeros((8, 8, 3), np.uint8)
    halves[:4] = 200
    assert score(reward, Image.fromarray(grey), Image.fromarray(halves)) == pytest.approx([0, 1], abs=1e-6)
    assert reward.counts == {"no face": 0, "pictures": 2}


def test_a_metric_of_which_less_is_better_is_negated() -> None:
    import pyiqa

    reward, picture = FaceIQA(metric="piqe", device="cpu"), noise(0, 128)
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
    by_pyiqa = float(pyiqa.create_metric("piqe", device=CPU)(pixels))
    assert by_pyiqa > 0
    assert score(reward, picture) == [-by_pyiqa]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("topiq_nr-faces", "did you mean 'topiq_nr-face'?"),
        ("psnr", "judges a picture by itself"),  # compares with a reference
        ("fid", "judges a picture by itself"),  # compares sets of pictures
    ],
)
def test_a_metric_that_cannot_be_a_reward_is_refused(name: str, hint: str) -> None:
    with pytest.raises(ValueError, match=f"'{name}' is no metric of pyiqa that judges a picture by itself;") as error:
        FaceIQA(metric=name)
    assert hint in str(error.value)


def test_files_for_a_metric_that_takes_none_are_refused() -> None:
    with pytest.raises(ValueError, match="weights and detector are for face metrics, and 'entropy' is none"):
        FaceIQA(metric="entropy", weights="x.pth")


def test_pyiqa_reads_its_own_files_with_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pyiqa.archs import arch_util, brisque_arch

    monkeypatch.setattr(arch_util, "load_file_from_url", lambda *_, **__: str(bad_pickle(tmp_path)))
    monkeypatch.setattr(brisque_arch, "load_file_from_url", lambda *_, **__: str(bad_pickle(tmp_path)))
    with pytest.raises(RuntimeError, match="pyiqa could not make the metric 'brisque'"):
        FaceIQA(metric="brisque", device="cpu")
    assert not (tmp_path / "ran").exists()
    assert torch.load.__name__ == "load" and torch.load is metrics._load


def test_a_metric_without_its_package_names_it() -> None:
    with pytest.raises(RuntimeError, match="the metric 'qalign' of pyiqa needs the package '"):
        FaceIQA(metric="qalign", device="cpu")


# files ----------------------------------------------------------------------------------------------------------------


class _Bad:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return Path.touch, (self.marker,)


def bad_pickle(folder: Path) -> Path:
    """A file that makes `ran` in the folder if it is unpickled."""
    file = folder / "bad.pth"
    file.write_bytes(pickle.dumps({"params": _Bad(folder / "ran")}))
    return file


def test_a_pickle_that_is_not_the_official_file_needs_a_word(folder: Path) -> None:
    digest = hashlib.sha256((folder / "topiq.pth").read_bytes()).hexdigest()
    with pytest.raises(ValueError, match=f"'topiq.pth' .* {digest} does not begin with 0a8b8e4f .*allow_pickle=true"):
        make(folder, "blind", allow_pickle=False)


def test_a_file_of_the_official_sha256_needs_none(folder: Path) -> None:
    digest = hashlib.sha256((folder / "blind.pth").read_bytes()).hexdigest()
    official = weights.Published("somewhere", "blind.pth", digest, "detector")
    read = weights.read(folder / "blind.pth", official, allow_pickle=False)
    assert "body.conv1.weight" in read  # without the "module." of the file


def test_a_pickle_never_runs_code_even_when_it_is_allowed(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'bad\.pth' .* holds more than tensors"):
        make(folder, "blind", weights=str(bad_pickle(tmp_path)))
    assert not (tmp_path / "ran").exists()


def test_a_safetensors_file_needs_no_word_and_gives_the_same(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    for name in ("topiq", "seeing"):
        loaded = torch.load(folder / f"{name}.pth", weights_only=True)
        tensors = {key.removeprefix("module."): value for key, value in loaded.get("params", loaded).items()}
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
    files = {"weights": f"{tmp_path}/topiq.safetensors", "detector": f"{tmp_path}/seeing.safetensors"}
    reward = FaceIQA(**files, device="cpu")
    assert score(reward, noise(0)) == score(make(folder, "seeing"), noise(0))


@pytest.mark.parametrize(("file", "option"), [("topiq", "weights"), ("blind", "detector")])
def test_a_checkpoint_that_does_not_fit_is_refused(folder: Path, tmp_path: Path, file: str, option: str) -> None:
    loaded = torch.load(folder / f"{file}.pth", weights_only=True)
    table = loaded.get("params", loaded)
    first, second = list(table)[:2]
    table["extra.weight"] = torch.zeros(2)
    table[second] = torch.zeros(7, 7, 7)
    del table[first]
    torch.save(loaded, tmp_path / "other.pth")
    with pytest.raises(ValueError, match="does not fit") as error:
        make(folder, "blind", **{option: str(tmp_path / "other.pth")})
    first, second = first.removeprefix("module."), second.removeprefix("module.")
    assert f"missing {first}; unexpected extra.weight; of another shape {second}; it wants '" in str(error.value)


def test_a_file_that_is_not_there_is_named_with_what_it_should_be(folder: Path) -> None:
    official = "'topiq_nr_cgfiqa_res50-0a8b8e4f.pth' of chaofengc/IQA-PyTorch-Weights"
    with pytest.raises(FileNotFoundError, match=f"no file 'none.pth' .option weights.; it wants {official}"):
        make(folder, "blind", weights="none.pth")
    with pytest.raises(
        FileNotFoundError, match=r"'none\.pth' .option detector.; it wants 'detection_Resnet50_Final\.pth'"
    ):
        make(folder, "blind", detector="none.pth")


_OFFLINE = """
import sys
from texforce_face_iqa.reward import FaceIQA
try:
    FaceIQA(weights=sys.argv[1], device="cpu", allow_pickle=True)
except FileNotFoundError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("", "'topiq_nr_cgfiqa_res50-0a8b8e4f.pth' of chaofengc/IQA-PyTorch-Weights could not be fetched ("),
        (
            "topiq.pth",
            "'detection_Resnet50_Final.pth' of github.com/xinntao/facexlib (release v0.1.0) could not be fetched (",
        ),
    ],
)
def test_without_a_network_repository_file_and_option_are_named(
    folder: Path, tmp_path: Path, given: str, sentence: str
) -> None:
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    caches = {"HF_HOME": str(tmp_path), "TORCH_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = [sys.executable, "-c", _OFFLINE, str(folder / given) if given else ""]
    told = subprocess.run(run, env={**os.environ, **nowhere, **caches}, capture_output=True, text=True, check=True)
    assert told.stdout.startswith(sentence)
    option = "detector" if given else "weights"
    assert told.stdout.endswith(f"; get it by hand and give it with --reward-option face-iqa.{option}=FILE\n")


# the contract ---------------------------------------------------------------------------------------------------------


def test_importing_the_registration_imports_nothing_heavy() -> None:
    code = "import sys, texforce_face_iqa; print([m for m in ('torch', 'pyiqa', 'numpy', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_order_and_batch_make_no_difference(seeing: FaceIQA) -> None:
    pictures = [noise(0), noise(1)]
    together = score(seeing, *pictures)
    assert score(seeing, *pictures[::-1]) == together[::-1]
    assert score(seeing, pictures[1]) == together[1:]


def test_a_device_that_is_not_there_is_refused_in_one_sentence() -> None:
    with pytest.raises(ValueError, match="the device 'abacus' is not available here; use auto, cpu or cuda"):
        FaceIQA(metric="entropy", device="abacus")


def test_it_keeps_the_contract_of_texforce(folder: Path) -> None:
    testing = pytest.importorskip("texforce_cli.testing")
    testing.check_reward("texforce_face_iqa", "face-iqa", options={"metric": "entropy", "device": "cpu"})
    files = {"weights": str(folder / "topiq.pth"), "detector": str(folder / "blind.pth")}
    testing.check_reward("texforce_face_iqa", "face-iqa", options={**files, "device": "cpu", "allow_pickle": "true"})
