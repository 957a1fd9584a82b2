"""The embedded model: a whole Stable Diffusion pipeline of 6 million parameters that draws 64x64 emoji scenes.

The manifest is the door between code and weights: its version and SHA-256 are what run folders record, and a test holds
it to the files.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
"""A folder in diffusers' own layout: `StableDiffusionPipeline.from_pretrained(WEIGHTS)` loads it, offline."""

CLIP = Path(__file__).parent / "clip"
JUDGE = Path(__file__).parent / "judge"
"""The two judges of the embedded world, each a folder that transformers' AutoModel loads."""

MANIFEST = Path(__file__).parent / "manifest.json"


def manifest() -> dict[str, str]:
    """`version` of the weights and `sha256` over all their files."""
    result: dict[str, str] = json.loads(MANIFEST.read_text(encoding="utf-8"))
    return result


def weights_sha256() -> str:
    """SHA-256 over the relative name and content of every file of the weights, in order of name."""
    digest = hashlib.sha256()
    for path in sorted(path for path in WEIGHTS.rglob("*") if path.is_file()):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(WEIGHTS).as_posix()} {content}\n".encode())
    return digest.hexdigest()
