"""Rewards that know the embedded world: how well a 64x64 emoji picture agrees with its prompt."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModel, CLIPTokenizer

from texforce_cli.quiet import quiet
from texforce_cli.tiny import CLIP, JUDGE


class Agreement:
    """Cosine, -1 to 1, between the embeddings of a picture and its prompt in the contrastive model of `folder`."""

    input = "uint8"

    def __init__(self, folder: Path) -> None:
        with quiet():
            self._model = AutoModel.from_pretrained(folder, dtype=torch.float32, use_safetensors=True).eval()
            self._tokenizer = CLIPTokenizer.from_pretrained(folder)

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One cosine an image."""
        distinct = {prompt: i for i, prompt in enumerate(dict.fromkeys(prompts))}
        read = self.embed_prompts(list(distinct))[[distinct[prompt] for prompt in prompts]]
        return [float(value) for value in (self.embed_images(images) * read).sum(1)]

    @torch.no_grad()
    def embed_images(self, images: NDArray[np.uint8]) -> torch.Tensor:
        """Unit vectors (n, d) of uint8 (n, height, width, 3) pictures; other sizes are scaled to 64x64."""
        x = torch.from_numpy(np.array(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
        if x.shape[-2:] != (64, 64):
            x = torch.nn.functional.interpolate(x, (64, 64), mode="bilinear", antialias=True)
        vectors = self._model.get_image_features(pixel_values=x).pooler_output
        return torch.nn.functional.normalize(vectors, dim=-1)

    @torch.no_grad()
    def embed_prompts(self, prompts: Sequence[str]) -> torch.Tensor:
        """Unit vectors (n, d) of the prompts, each cut at 32 tokens."""
        ids = self._tokenizer(
            list(prompts), padding="max_length", truncation=True, max_length=32, return_tensors="pt"
        ).input_ids
        return torch.nn.functional.normalize(self._model.get_text_features(input_ids=ids).pooler_output, dim=-1)


class TinyClip(Agreement):
    """The judge that runs may be rewarded by."""

    def __init__(self) -> None:
        super().__init__(CLIP)


class TinyJudge(Agreement):
    """The judge that no run should be rewarded by: another architecture, trained on other pictures."""

    def __init__(self) -> None:
        super().__init__(JUDGE)
