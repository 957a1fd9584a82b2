"""Random weights for `face-iqa` in the official formats; run by `tools.reward_weights` with the interpreter of its environment.

    ENVIRONMENT/bin/python -I tools/face_iqa_weights.py FOLDER

The detector says "here is a face" of every picture, at the same place; the quality net's numbers mean nothing.
"""

from __future__ import annotations

import sys
from pathlib import Path

from texforce_face_iqa import metrics  # noqa: F401 - makes torchvision importable

# isort: split
import torch
from facexlib.detection.retinaface import RetinaFace
from pyiqa.models.inference_model import InferenceModel

# eyes, nose and corners of the mouth about the middle of a face, in tenths of the side of its box
_LANDMARKS = [-1.2, -0.3, 1.2, -0.3, 0.0, 1.1, -1.1, 2.2, 1.1, 2.2]


def main(folder: Path) -> None:
    """Write topiq_nr_cgfiqa_res50.pth and detection_Resnet50_Final.pth."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    made = InferenceModel(
        "topiq_nr-face", device=torch.device("cpu"), model_name="", pretrained=False, backbone_pretrain=False
    )
    torch.save({"params": made.net.state_dict()}, folder / "topiq_nr_cgfiqa_res50.pth")
    tensors = RetinaFace("resnet50", device=torch.device("cpu")).state_dict()
    for name, value in tensors.items():
        if "Head" in name:  # the same answer for every cell
            value.zero_()
        if "ClassHead" in name and name.endswith("bias"):  # (no face, face) for the two boxes of a cell
            value.copy_(torch.tensor([10.0, -10.0, 10.0, -10.0]))
    tensors["ClassHead.2.conv1x1.bias"].copy_(torch.tensor([-10.0, 10.0, 10.0, -10.0]))
    tensors["LandmarkHead.2.conv1x1.bias"][:10] = torch.tensor(_LANDMARKS)
    torch.save({f"module.{name}": value for name, value in tensors.items()}, folder / "detection_Resnet50_Final.pth")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
