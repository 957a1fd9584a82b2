"""The reward `face-iqa`: a metric of pyiqa, by default the one for faces."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image

from texforce_face_iqa.metrics import looks_for_faces, make_face_metric, make_metric, no_reference_metrics


class FaceIQA:
    """The quality of the face nearest to the middle of the picture, about 0 to 1; `no_face` where there is none.

    With another `metric`, what that metric says of the picture; negative if in pyiqa less is better, so that more is
    always better here.

    Args:
        metric: a metric of pyiqa that needs no reference picture, as in topiq_nr, musiq, niqe.
        weights: the file of a face metric (topiq_nr_cgfiqa_res50-0a8b8e4f.pth); left out, it comes from the Hub.
        detector: facexlib's detection_Resnet50_Final.pth; left out, it comes from facexlib's release.
        no_face: the score of a picture in which no face is found.
        device: auto, cpu or cuda.
        allow_pickle: read a .pth file that is not the official one; even then it can hold nothing but tensors.
    """

    def __init__(
        self,
        metric: str = "topiq_nr-face",
        weights: str = "",
        detector: str = "",
        no_face: float = 0.0,
        device: str = "auto",
        allow_pickle: bool = False,
    ) -> None:
        _check_metric(metric)
        self._no_face = no_face
        self._faces = looks_for_faces(metric)
        if self._faces:
            self._metric = make_face_metric(metric, weights, detector, _choose(device), allow_pickle=allow_pickle)
        elif weights or detector:
            raise ValueError(
                f"weights and detector are for face metrics, and '{metric}' is none; pyiqa gets its files itself"
            )
        else:
            self._metric = make_metric(metric, _choose(device))
        self._sign = -1.0 if self._metric.lower_better else 1.0
        self.counts = {"no face": 0, "pictures": 0}

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One number an image, in order."""
        return [self._score(image) for image in images]  # one by one: TOPIQ for faces takes no batch

    def _score(self, image: Image.Image) -> float:
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        self.counts["pictures"] += 1
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", UserWarning)  # that a face metric takes no batch
                return self._sign * float(self._metric(pixels))
        except AssertionError as error:
            if not (self._faces and "No face" in str(error)):
                raise
        self.counts["no face"] += 1
        return self._no_face


def _check_metric(metric: str) -> None:
    known = no_reference_metrics()
    if metric in known:
        return
    close = difflib.get_close_matches(metric, known, n=1)
    hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(known)}"
    raise ValueError(f"'{metric}' is no metric of pyiqa that judges a picture by itself; {hint}")


def _choose(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(f"the device '{device}' is not available here; use auto, cpu or cuda") from error
    return chosen
