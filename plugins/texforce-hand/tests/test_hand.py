"""Needs an environment made from texforce_hand/locks/cpu.txt, or from cpu-1.2.txt with TEXFORCE_HAND_TASK=FILE.task."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from texforce_hand.models import LANDMARKS, PALM, find_models
from texforce_hand.reward import Hand, letterbox

PICTURES = Path(__file__).parent / "pictures"
BRINGS_MODELS = version("mediapipe").startswith("0.")
TASK = os.environ.get("TEXFORCE_HAND_TASK", "")

if not (BRINGS_MODELS or TASK):
    pytest.skip("mediapipe 1.x brings no models: set TEXFORCE_HAND_TASK", allow_module_level=True)


def strip(name: str) -> list[Image.Image]:
    pixels = np.array(Image.open(PICTURES / f"{name}.png"))
    return [Image.fromarray(part) for part in np.split(pixels, pixels.shape[1] // pixels.shape[0], axis=1)]


def scores(reward: Hand, pictures: list[Image.Image]) -> NDArray[np.float64]:
    return np.array(reward.score(pictures, [""] * len(pictures), [{} for _ in pictures]))


@pytest.fixture(scope="module")
def palm() -> Hand:
    return Hand(model=TASK)


@pytest.fixture(scope="module")
def handedness() -> Hand:
    return Hand(model=TASK, measure="handedness")


# what the number is ---------------------------------------------------------------------------------------------------


def test_a_hand_scores_above_a_spoiled_one_and_that_above_a_picture_without(palm: Hand) -> None:
    mean = {name: scores(palm, strip(name)).mean() for name in ("hand", "shuffled", "cut", "blurred", "without")}
    assert mean["hand"] > 0.9
    assert mean["without"] < 0.2
    for spoiled in ("shuffled", "cut", "blurred"):
        assert mean["without"] + 0.1 < mean[spoiled] < mean["hand"] - 0.1


@pytest.mark.parametrize("spoiled", ["shuffled", "cut", "blurred"])
def test_spoiling_lowers_the_score_of_every_single_hand(palm: Hand, spoiled: str) -> None:
    assert (scores(palm, strip(spoiled)) < scores(palm, strip("hand"))).all()


def test_the_scores_are_the_measured_ones_on_both_lines_of_mediapipe(palm: Hand) -> None:
    assert scores(palm, strip("hand")) == pytest.approx([0.963, 0.950, 0.917, 0.944], abs=0.003)
    assert scores(palm, strip("blurred")) == pytest.approx([0.809, 0.872, 0.601, 0.526], abs=0.003)


def test_the_score_is_the_threshold_below_which_mediapipe_itself_finds_the_hand(palm: Hand) -> None:
    from mediapipe import Image as Picture
    from mediapipe import ImageFormat
    from mediapipe.tasks.python import BaseOptions, vision

    task = find_models(TASK).task()
    tall = strip("hand")[0].crop((40, 0, 216, 256))  # not square: letterboxed

    def finds(picture: Image.Image, threshold: float) -> bool:
        options = vision.HandLandmarkerOptions(
            BaseOptions(model_asset_buffer=task),
            num_hands=1,
            min_hand_detection_confidence=threshold,
            min_hand_presence_confidence=0.0,
        )
        with vision.HandLandmarker.create_from_options(options) as landmarker:
            return bool(landmarker.detect(Picture(ImageFormat.SRGB, np.array(picture))).handedness)

    for picture in (strip("hand")[1], strip("blurred")[3], strip("without")[2], tall):
        score = float(scores(palm, [picture])[0])
        assert finds(picture, score - 1e-4)
        assert not finds(picture, score + 1e-4)


def test_an_empty_picture_is_no_hand_and_no_error(palm: Hand, handedness: Hand) -> None:
    grey = Image.new("RGB", (64, 64), (128, 128, 128))
    assert 0 < scores(palm, [grey])[0] < 0.1
    assert scores(handedness, [grey])[0] == 0


def test_handedness_is_a_step_where_the_palm_score_is_a_slope(palm: Hand, handedness: Hand) -> None:
    assert (scores(handedness, strip("hand")) > 0.9).all()
    assert (scores(handedness, strip("blurred")) == 0).all()
    assert (scores(palm, strip("blurred")) > 0.5).all()


# the picture that the model sees --------------------------------------------------------------------------------------


def test_the_letterbox_puts_a_wide_picture_in_the_middle_with_black_above_and_below() -> None:
    # doubled in size and moved down by 2: row r of the result lies at row (r - 2) / 2 of the picture
    boxed = letterbox(np.full((2, 4, 3), 200, np.uint8), 8, 8)
    assert boxed[:, 2, 0].tolist() == [0, 100, 200, 200, 200, 100, 0, 0]


def test_the_letterbox_leaves_a_picture_of_the_right_size_as_it_is() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (192, 192, 3), dtype=np.uint8)
    assert np.array_equal(letterbox(picture, 192, 192), picture)


def test_the_letterbox_halves_a_picture_by_taking_every_second_pixel() -> None:
    # bilinear at the corner of a pixel, without smoothing: column 0 of the result is at column 0 of the picture
    picture = np.repeat(np.arange(0, 160, 10, dtype=np.uint8)[None, :, None], 16, 0).repeat(3, 2)
    assert letterbox(picture, 8, 8)[0, :, 0].tolist() == [0, 20, 40, 60, 80, 100, 120, 140]


# the contract ---------------------------------------------------------------------------------------------------------


def test_order_and_batch_make_no_difference_and_pictures_are_counted() -> None:
    reward = Hand(model=TASK)
    pictures = [strip("hand")[0], strip("without")[2], strip("blurred")[0]]
    together = scores(reward, pictures)
    assert [float(scores(reward, [picture])[0]) for picture in pictures] == together.tolist()
    assert scores(reward, pictures[::-1]).tolist() == together[::-1].tolist()
    assert reward.counts == {"no hand": 3, "pictures": 9}  # the second picture, three times
    reward.close()


def test_grey_pictures_and_pictures_with_transparency_are_scored(palm: Hand) -> None:
    hand = strip("hand")[0]
    assert scores(palm, [hand.convert("RGBA")]) == scores(palm, [hand])
    assert scores(palm, [hand.convert("L")]) == scores(palm, [hand.convert("L").convert("RGB")])


def test_importing_the_registration_imports_nothing_heavy() -> None:
    code = "import sys, texforce_hand; print([m for m in ('cv2', 'numpy', 'mediapipe', 'PIL') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_it_keeps_the_contract_of_texforce() -> None:
    testing = pytest.importorskip("texforce_cli.testing")
    testing.check_reward("texforce_hand", "hand", options={"model": TASK})


# files ----------------------------------------------------------------------------------------------------------------


def test_a_task_file_with_the_same_models_gives_the_same_scores(palm: Hand, tmp_path: Path) -> None:
    file = tmp_path / "copy.task"
    file.write_bytes(find_models(TASK).task())
    with zipfile.ZipFile(file) as archive:
        assert {one.filename: one.compress_type for one in archive.infolist()} == {PALM: 0, LANDMARKS: 0}
    reward = Hand(model=str(file))
    assert scores(reward, strip("hand")).tolist() == scores(palm, strip("hand")).tolist()


@pytest.mark.skipif(not BRINGS_MODELS, reason="mediapipe 1.x brings no models")
def test_the_command_writes_the_models_of_mediapipe_as_a_task_file(tmp_path: Path) -> None:
    file = tmp_path / "hand.task"
    subprocess.run([sys.executable, "-m", "texforce_hand", str(file)], check=True)
    assert find_models(str(file)) == find_models()


@pytest.mark.skipif(BRINGS_MODELS, reason="mediapipe 0.10.21 brings the models")
def test_without_models_the_sentence_names_the_file_and_the_option() -> None:
    with pytest.raises(FileNotFoundError, match=r"brings no '.*hand\.model=FILE\.task.*0\.10\.21"):
        Hand()


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError, match=r"no file 'missing\.task' \(option model\); give the path of Google's"):
        Hand(model="missing.task")


def test_a_file_that_is_no_task_file_is_named(tmp_path: Path) -> None:
    text, other = tmp_path / "text.task", tmp_path / "other.task"
    text.write_text("no zip")
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("face.tflite", b"")
    for file in (text, other):
        with pytest.raises(ValueError, match=rf"{file.name}' \(option model\) is no \.task file with {PALM}"):
            Hand(model=str(file))


def test_a_task_file_with_other_models_inside_is_refused(tmp_path: Path) -> None:
    swapped, damaged = tmp_path / "swapped.task", tmp_path / "damaged.task"
    models = find_models(TASK)
    for file, content in ((swapped, models.landmarks), (damaged, models.palm[:1000])):
        with zipfile.ZipFile(file, "w") as archive:
            archive.writestr(PALM, content)
            archive.writestr(LANDMARKS, models.landmarks)
    with pytest.raises(ValueError, match="the palm detector has no output with one number a cell"):
        Hand(model=str(swapped))
    with pytest.raises(ValueError, match="the palm detector is no model that LiteRT can run"):
        Hand(model=str(damaged))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"measure": "palms"}, "unknown measure 'palms'; use palm or handedness"),
        ({"device": "cuda"}, "the reward hand cannot run on the device 'cuda'; use cpu"),
    ],
)
def test_a_wrong_option_is_refused_in_one_sentence(options: dict[str, str], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        Hand(model=TASK, **options)
