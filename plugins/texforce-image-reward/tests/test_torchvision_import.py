"""torchvision beside a CPU build of torch, and the files that the plugins share."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from texforce_image_reward._torchvision import _nms, import_torchvision


def test_torchvision_is_imported_and_the_second_call_gives_the_same_module():
    torchvision = import_torchvision()
    assert torchvision.transforms.Resize(8) is not None
    assert import_torchvision() is torchvision


@pytest.mark.parametrize("compute", ["torchvision", "plain"])
def test_boxes_that_a_better_one_overlaps_by_more_than_the_threshold_are_dropped(compute):
    torchvision = import_torchvision()
    nms = torchvision.ops.nms if compute == "torchvision" else _nms
    # the second is half of the first (overlap 50/100), the third 80/100 of it, the fourth lies apart
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 5], [0, 0, 10, 8], [20, 20, 30, 30]], dtype=torch.float32)
    scores = torch.tensor([0.9, 0.8, 0.7, 0.95])
    assert nms(boxes, scores, 0.5).tolist() == [3, 0, 1]
    assert nms(boxes, scores, 0.4).tolist() == [3, 0]
    assert nms(boxes, scores, 0.9).tolist() == [3, 0, 1, 2]
    assert nms(boxes[:0], scores[:0], 0.5).tolist() == []


def test_boxes_of_different_classes_do_not_drop_each_other():
    boxes = torch.tensor([[0, 0, 10, 10], [0, 0, 10, 9]], dtype=torch.float32)
    scores = torch.tensor([0.5, 0.6])
    nms = import_torchvision().ops.batched_nms
    assert nms(boxes, scores, torch.tensor([0, 0]), 0.5).tolist() == [1]
    assert nms(boxes, scores, torch.tensor([0, 1]), 0.5).tolist() == [1, 0]


@pytest.mark.parametrize("name", ["_torchvision.py", "_loading.py"])
def test_the_neighbours_carry_the_same_file(name):
    mine = Path(__file__).parents[1] / "texforce_image_reward" / name
    for copy in Path(__file__).parents[2].glob(f"texforce-*/texforce_*/{name}"):
        assert copy.read_bytes() == mine.read_bytes(), f"{copy} differs"
