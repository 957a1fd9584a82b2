"""What the networks that score pictures share: how a picture is read, batches, and the head that follows an embedding.

`score` has pictures resized by Pillow, as the originals have; `score_tensor` by torch, which follows Pillow's steps: first
one axis, then the other, each clipped and rounded to 8 bits (the gradient passes the rounding as if it were not there).
One pixel value in a hundred still comes out 1/255 or 2/255 away from Pillow's.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch.nn import functional as F

from texforce_cli.devices import resolve_device
from texforce_cli.errors import UsageError
from texforce_cli.rewards.weights import Tensors

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""Of the pictures that CLIP was trained on (Radford et al. 2021); HPSv2 and ImageReward took them over."""


class Reading(Protocol):
    """How pictures become what a network sees."""

    def picture(self, image: Image.Image) -> torch.Tensor:
        """[3, size, size] of a Pillow picture."""
        ...

    def tensor(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, size, size] of float [n, 3, height, width] in [0, 1], with gradient."""
        ...


def as_tensor(image: Image.Image) -> torch.Tensor:
    """Float [3, height, width] in [0, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 255


def normalised(values: torch.Tensor, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> torch.Tensor:
    """Less the mean and over the deviation of each colour, for [..., 3, height, width]."""
    shift, scale = (values.new_tensor(numbers)[:, None, None] for numbers in (mean, std))
    return (values - shift) / scale


class Crop:
    """The shorter side scaled to `size`, and the middle square of that: how CLIP and ImageReward read pictures."""

    def __init__(self, size: int, mean: Sequence[float] = MEAN, std: Sequence[float] = STD) -> None:
        self.size, self.mean, self.std = size, mean, std

    def picture(self, image: Image.Image) -> torch.Tensor:
        """[3, size, size] of a Pillow picture, resized by Pillow."""
        height, width = self._scaled(image.height, image.width)
        return self._middle(as_tensor(image.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)))

    def tensor(self, images: torch.Tensor) -> torch.Tensor:
        """[n, 3, size, size] of float pictures, resized by torch."""
        size = self._scaled(images.shape[-2], images.shape[-1])
        there = images.device
        near = images.cpu() if there.type == "mps" else images  # Apple's GPU has no double precision
        exact = near.double()  # in single precision torch weighs pixels by positions that are off by up to 1e-4
        for target in ((exact.shape[-2], size[1]), size):
            if target != tuple(exact.shape[-2:]):
                exact = F.interpolate(exact, target, mode="bicubic", antialias=True).clamp(0, 1)
                exact = exact + ((exact * 255 + 0.5).floor() / 255 - exact).detach()
        return self._middle(exact.to(images.dtype).to(there))

    def _scaled(self, height: int, width: int) -> tuple[int, int]:
        short = min(height, width)
        return int(self.size * height / short), int(self.size * width / short)

    def _middle(self, values: torch.Tensor) -> torch.Tensor:
        top, left = (round((side - self.size) / 2) for side in values.shape[-2:])
        return normalised(values[..., top : top + self.size, left : left + self.size], self.mean, self.std)


class PictureReward(ABC):
    """A frozen network that gives a number to a picture and its prompt, in batches."""

    def __init__(self, reading: Reading, device: str, batch: int) -> None:
        if batch < 1:
            raise UsageError(f"the option batch is {batch}", "give 1 or more")
        self._reading, self._device, self._batch = reading, resolve_device(device), batch

    @abstractmethod
    def values(self, pixels: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """[n] for what the network sees and the prompts."""

    @torch.no_grad()
    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One number an image."""
        found: list[float] = []
        for i in range(0, len(images), self._batch):
            pixels = torch.stack([self._reading.picture(image) for image in images[i : i + self._batch]])
            found += self.values(pixels.to(self._device), prompts[i : i + self._batch]).tolist()
        return found

    def score_tensor(self, images: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """[n] for float [n, 3, height, width] in [0, 1], with gradient."""
        found = []
        for i in range(0, len(images), self._batch):
            pixels = self._reading.tensor(images[i : i + self._batch].to(self._device, torch.float32))
            found.append(self.values(pixels, prompts[i : i + self._batch]))
        return torch.cat(found)

    def _frozen(self, network: torch.nn.Module) -> Any:
        return network.requires_grad_(False).eval().to(self._device)


class Head(torch.nn.Module):
    """Linear layers one after the other, as the LAION aesthetic predictor and ImageReward end; sizes from `tensors`.

    Their dropout between the layers does nothing outside training, and there is no activation function.
    """

    def __init__(self, tensors: Tensors) -> None:
        super().__init__()
        weights = [name for name in tensors if name.startswith("layers.") and name.endswith(".weight")]
        numbers = sorted(int(name.split(".")[1]) for name in weights)
        shapes = {number: tensors[f"layers.{number}.weight"].shape for number in numbers}
        self.layers = torch.nn.ModuleDict(
            {str(number): torch.nn.Linear(inputs, outputs) for number, (outputs, inputs) in shapes.items()}
        )

    def forward(self, embeddings: torch.Tensor) -> torch.Tensor:
        """[n] of [n, d]."""
        for layer in self.layers.values():
            embeddings = layer(embeddings)
        return embeddings.squeeze(-1)
