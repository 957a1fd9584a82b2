"""Small random checkpoints in the official format, made from the classes of the original package."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from texforce_hpsv2 import reward

CONFIG: dict[str, Any] = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 28, "layers": 2, "width": 80, "head_width": 40, "patch_size": 14},
    "text_cfg": {"context_length": 77, "vocab_size": 49408, "width": 32, "heads": 4, "layers": 2},
}


@dataclass(frozen=True)
class Small:
    """The folder of two small checkpoints, the network that the first was saved from, and how to write others."""

    folder: Path
    model: torch.nn.Module
    config: dict[str, Any]
    write: Callable[..., Path]


def write(folder: Path, tensors: dict[str, torch.Tensor], config: Any = None) -> Path:
    """Both official files and the configuration in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": tensors}, folder / "HPS_v2_compressed.pt")
    later = {name: value * 1.5 if value.ndim > 1 else value for name, value in tensors.items()}
    torch.save({"state_dict": later}, folder / "HPS_v2.1_compressed.pt")
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config or CONFIG}), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """Two million weights, most of them of the vocabulary; in half precision as the official ones."""
    torch.manual_seed(0)
    model = reward._import_original().model.CLIP(**CONFIG, output_dict=True).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:  # larger than at initialisation, so that scores differ visibly
                weight.copy_(torch.randn_like(weight) * weight[0].numel() ** -0.5)
            weight.copy_(weight.half())
    tensors = {name: value.half() for name, value in model.state_dict().items()}
    return Small(write(tmp_path_factory.mktemp("small"), tensors), model, CONFIG, write)


@pytest.fixture()
def spoiled(small: Small, tmp_path: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], object]], Path]:
    """A copy of the small checkpoint after a change of its tensors."""

    def make(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        tensors = dict(small.model.state_dict())
        change(tensors)
        return write(tmp_path / "spoiled", tensors)

    return make


@pytest.fixture()
def img_score(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The original's own module of `hpsv2.score`; what it imports for progress bars and never calls here is empty."""
    reward._import_original()  # its tokenizer, without whose vocabulary the wheel cannot be imported
    for name in ("turtle", "requests", "clint", "clint.textui"):
        empty = ModuleType(name)
        empty.forward = empty.progress = empty.textui = None  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, empty)
    import hpsv2.img_score

    monkeypatch.setattr(hpsv2.img_score, "device", "cpu")
    return hpsv2.img_score


@pytest.fixture()
def pictures() -> list[Image.Image]:
    """Three that differ, two of them not square."""
    noise = torch.Generator().manual_seed(1)
    sides = ((64, 64), (50, 80), (96, 40))
    return [
        Image.fromarray(torch.randint(0, 256, (*side, 3), dtype=torch.uint8, generator=noise).numpy()) for side in sides
    ]
