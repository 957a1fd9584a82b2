"""Where randomness comes from: a number for every purpose, made of the run's seed and of nothing else."""

from __future__ import annotations

import hashlib


def derive(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose: `derive(seed, "image", epoch, index)`.

    Made with SHA-256, so it is the same on every machine and independent of batch size, order and process.
    """
    text = "/".join(str(part) for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
