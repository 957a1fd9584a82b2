"""The reward `hand`: what MediaPipe's hand models say of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from texforce_hand.models import Models, find_models

MEASURES = ("palm", "handedness")


class _Measure(Protocol):
    def __call__(self, image: NDArray[np.uint8]) -> float: ...

    def close(self) -> None: ...


class Hand:
    """The confidence, 0 to 1, of the palm detector's best cell, whether or not it would count as a detection.

    `counts` says for how many pictures there was no hand by MediaPipe's own threshold of 0.5.

    Args:
        model: a `.task` file with the two models; left out, those inside mediapipe 0.10.21.
        measure: palm, the number above; handedness, a proxy: how sure the landmark model is that a hand which was found is
            a left or a right one, 0 where none is found.
        device: cpu; the models run nowhere else.
    """

    def __init__(self, model: str = "", measure: str = "palm", device: str = "cpu") -> None:
        if measure not in MEASURES:
            raise ValueError(f"unknown measure '{measure}'; use {' or '.join(MEASURES)}")
        if device not in ("cpu", "auto"):
            raise ValueError(f"the reward hand cannot run on the device '{device}'; use cpu")
        models = find_models(model)
        self._measure: _Measure = Palm(models) if measure == "palm" else Handedness(models)
        self.counts = {"no hand": 0, "pictures": 0}

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One number an image, in order."""
        scores = [self._measure(np.asarray(image.convert("RGB"))) for image in images]
        self.counts["no hand"] += sum(score < 0.5 for score in scores)
        self.counts["pictures"] += len(scores)
        return scores

    def close(self) -> None:
        """Free the models."""
        self._measure.close()


class Palm:
    """The palm detector alone, without the threshold, the boxes and the suppression that follow in MediaPipe's graph."""

    def __init__(self, models: Models) -> None:
        from ai_edge_litert.interpreter import Interpreter

        try:
            self._interpreter: Any = Interpreter(model_content=models.palm)
            self._interpreter.allocate_tensors()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"the palm detector is no model that LiteRT can run ({error}); get the file again"
            ) from error
        (self._input,) = self._interpreter.get_input_details()
        classes = [one for one in self._interpreter.get_output_details() if one["shape"][-1] == 1]
        if len(classes) != 1 or len(self._input["shape"]) != 4:
            raise ValueError("the palm detector has no output with one number a cell; get hand_landmarker.task")
        self._output = classes[0]

    def __call__(self, image: NDArray[np.uint8]) -> float:
        """The sigmoid of the highest class score of all cells."""
        _, height, width, _ = self._input["shape"]
        pixels = letterbox(image, int(width), int(height)).astype(np.float32) / np.float32(255)
        self._interpreter.set_tensor(self._input["index"], pixels[None])
        self._interpreter.invoke()
        logit = float(self._interpreter.get_tensor(self._output["index"]).max())
        return 1 / (1 + math.exp(-min(max(logit, -100.0), 100.0)))

    def close(self) -> None:
        """Free the interpreter."""
        self._interpreter = None


def letterbox(image: NDArray[np.uint8], width: int, height: int) -> NDArray[np.uint8]:
    """The whole picture in the middle of one of `height` x `width`, black around it, sampled as MediaPipe does.

    That is bilinear sampling without smoothing first; smoother resizing moves the score of a hand by up to 0.01.
    """
    rows, columns = image.shape[:2]
    scale = min(width / columns, height / rows)
    across, down = (width - scale * columns) / 2, (height - scale * rows) / 2
    matrix = np.array([[scale, 0, across], [0, scale, down], [0, 0, 1]])
    return np.asarray(cv2.warpPerspective(image, matrix, (width, height), flags=cv2.INTER_LINEAR), dtype=np.uint8)


class Handedness:
    """MediaPipe's own HandLandmarker with its default thresholds: the highest handedness confidence of two hands."""

    def __init__(self, models: Models) -> None:
        import mediapipe
        from mediapipe.tasks.python import BaseOptions, vision

        self._mediapipe = mediapipe
        options = vision.HandLandmarkerOptions(BaseOptions(model_asset_buffer=models.task()), num_hands=2)
        try:
            self._landmarker = vision.HandLandmarker.create_from_options(options)
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"MediaPipe cannot use the hand models ({error}); get hand_landmarker.task again"
            ) from error

    def __call__(self, image: NDArray[np.uint8]) -> float:
        """Its confidence that the hand is the left or the right one, at least 0.5; 0 where no hand is found."""
        picture = self._mediapipe.Image(self._mediapipe.ImageFormat.SRGB, np.ascontiguousarray(image))
        found = self._landmarker.detect(picture).handedness
        return max((float(hand[0].score) for hand in found), default=0.0)

    def close(self) -> None:
        """Free the landmarker; without it, it complains when the interpreter ends."""
        self._landmarker.close()
