"""The embedded model: a whole Stable Diffusion pipeline of 6 million parameters that draws 64x64 emoji scenes."""

from __future__ import annotations

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""A folder in diffusers' own layout: `StableDiffusionPipeline.from_pretrained(WEIGHTS)` loads it, offline."""
