"""Small random checkpoints in the official format, made from the classes of the original package."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from texforce_image_reward import reward

SIZE, WIDTH, DEPTH, TEXT_WIDTH = 32, 64, 2, 48
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "cat", "dog", "on", "the", "moon", "##s"]
CONFIG = {
    "architectures": ["BertModel"],
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": TEXT_WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": 96,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 64,
    "model_type": "bert",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "pad_token_id": 0,
    "add_type_embeddings": False,
    "vocab_size": len(WORDS) + 2,  # the original adds [DEC] and [ENC]
    "encoder_width": WIDTH,
    "add_cross_attention": True,
}


@dataclass(frozen=True)
class Small:
    """The folder of a small checkpoint, and the networks that it was saved from."""

    folder: Path
    model: torch.nn.Module

    def score(self, image: Image.Image, words: list[int]) -> float:
        """The reward worked out step by step from the original's networks, for one picture and its token numbers."""
        original = reward._import_original()
        blip: Any = self.model.blip
        seen = blip.visual_encoder(original._transform(SIZE)(image)[None])
        padded = torch.tensor([words + [0] * (35 - len(words))])
        read = blip.text_encoder(
            padded,
            attention_mask=(torch.arange(35)[None] < len(words)).long(),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long),
            return_dict=True,
        )
        raw = self.model.mlp(read.last_hidden_state[:, 0])
        return (raw.item() - 0.16717363030052426) / 1.0333394966054072


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """The three official files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    torch.save(tensors, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Small:
    """ImageReward of 0.2 million weights."""
    from transformers import BertConfig

    original = reward._import_original()
    vit = sys.modules["ImageReward.models.BLIP.vit"].VisionTransformer
    med = sys.modules["ImageReward.models.BLIP.med"]
    torch.manual_seed(0)
    model = torch.nn.Module()
    model.blip = torch.nn.Module()
    model.blip.visual_encoder = vit(img_size=SIZE, patch_size=16, embed_dim=WIDTH, depth=DEPTH, num_heads=1)
    model.blip.text_encoder = med.BertModel(BertConfig(**CONFIG), add_pooling_layer=False)
    model.blip.vision_proj = torch.nn.Linear(WIDTH, 256)
    model.blip.text_proj = torch.nn.Linear(TEXT_WIDTH, 256)
    model.mlp = original.MLP(TEXT_WIDTH)
    with torch.no_grad():
        for name, weight in model.named_parameters():  # larger than at initialisation, so that scores differ visibly
            weight.copy_(torch.randn_like(weight) * (0.3 if weight.ndim < 2 else weight[0].numel() ** -0.5))
            if "norm" in name.lower() and name.endswith("weight"):
                weight += 1
    return Small(write(tmp_path_factory.mktemp("small"), model.state_dict()), model.eval())


@pytest.fixture()
def spoiled(small: Small, tmp_path: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], object]], Path]:
    """A copy of the small checkpoint after a change of its tensors."""

    def make(change: Callable[[dict[str, torch.Tensor]], object]) -> Path:
        tensors = dict(small.model.state_dict())
        change(tensors)
        return write(tmp_path / "spoiled", tensors)

    return make


@pytest.fixture()
def pictures() -> list[Image.Image]:
    """Three that differ, one of them not square."""
    noise = torch.Generator().manual_seed(1)
    sides = ((64, 64), (50, 80), (32, 32))
    return [
        Image.fromarray(torch.randint(0, 256, (*side, 3), dtype=torch.uint8, generator=noise).numpy()) for side in sides
    ]
