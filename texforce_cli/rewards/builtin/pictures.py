"""Rewards that look at the file size or the light of a picture."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image


class JpegIncompressibility:
    """Size in kB (1000 bytes) of the picture saved as JPEG, the reward of DDPO (Black et al. 2024, sec. 5.1)."""

    def __init__(self, quality: int = 95) -> None:
        if not 1 <= quality <= 100:
            raise ValueError(f"quality {quality} is not between 1 and 100")
        self.quality = quality

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One size an image."""
        return [self._kilobytes(image) for image in images]

    def _kilobytes(self, image: Image.Image) -> float:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=self.quality)
        return buffer.tell() / 1000


class JpegCompressibility(JpegIncompressibility):
    """Minus the size in kB of the picture saved as JPEG."""

    def score(
        self, images: Sequence[Image.Image], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One negative size an image."""
        return [-size for size in super().score(images, prompts, metadata)]


class Brightness:
    """Mean luminance (ITU-R BT.601: 0.299 R + 0.587 G + 0.114 B) between 0 and 1."""

    input = "uint8"

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One mean luminance an image."""
        return [float(value) for value in (images @ np.array([0.299, 0.587, 0.114])).mean((1, 2)) / 255]
