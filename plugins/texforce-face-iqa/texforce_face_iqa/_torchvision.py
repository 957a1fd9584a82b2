"""torchvision, also where its compiled operators do not load.

The torchvision wheels on PyPI for Linux are built for CUDA. Beside a CPU build of torch their extension does not load, and
the import ends in `operator torchvision::nms does not exist`, although the transforms and models are plain Python. The same
file lies in every texforce plugin that needs torchvision, since a plugin depends on nothing of its neighbours.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

_MISSING = "operator torchvision::nms does not exist"
_libraries: list[Any] = []  # an operator lives as long as the Library that defined it


def import_torchvision() -> ModuleType:
    """torchvision, with non-maximum suppression in plain torch where its own operators did not load.

    Raises:
        ImportError: torchvision is not installed; any other error of its import is passed on as it is.
    """
    try:
        return importlib.import_module("torchvision")
    except RuntimeError as error:
        if _MISSING not in str(error):
            raise
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
        del sys.modules[name]  # what the failed import left behind
    if not _libraries:
        _define_operators()
    module = importlib.import_module("torchvision")
    # torchvision.ops.nms asks first whether the extension was loaded; the operator behind it is here now
    boxes: Any = importlib.import_module("torchvision.ops.boxes")
    boxes._assert_has_ops = lambda: None
    return module


def _define_operators() -> None:
    """Define the two operators whose schemas the import of torchvision asks for, and compute the first."""
    import torch

    definitions = torch.library.Library("torchvision", "FRAGMENT")
    definitions.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    # only its schema: quantised boxes occur in no reward
    definitions.define(
        "qnms(Tensor dets, Tensor scores, float iou_threshold, float dets_scale, int dets_zero_point) -> Tensor"
    )
    definitions.impl("nms", _nms, "CPU")
    _libraries.append(definitions)


def _nms(dets: Any, scores: Any, iou_threshold: float) -> Any:
    """Indices of the kept boxes [N, 4] (x1, y1, x2, y2), by falling score: those that no better kept box overlaps by more."""
    import torch

    order = scores.argsort(descending=True, stable=True)
    boxes = dets[order]
    area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    open_ = torch.ones(len(boxes), dtype=torch.bool)
    kept = []
    for i in range(len(boxes)):
        if not open_[i]:
            continue
        kept.append(i)
        low = torch.maximum(boxes[i, :2], boxes[i + 1 :, :2])
        high = torch.minimum(boxes[i, 2:], boxes[i + 1 :, 2:])
        shared = (high - low).clamp(min=0).prod(dim=1)
        overlap = shared / (area[i] + area[i + 1 :] - shared)
        open_[i + 1 :] &= ~(overlap > iou_threshold)
    return order[torch.tensor(kept, dtype=torch.long)]
