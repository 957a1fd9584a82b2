"""Fine-tune the text encoder of a Stable Diffusion model with reinforcement learning (TexForce, ECCV 2024).

from texforce_cli import sample, train

result = train(reward="jpeg-incompressibility", model="tiny", images=2560)
sample(["a cat"], loras=[result.adapter], seeds=range(4), out="pictures")
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"
__all__ = ["TexforceError", "__version__", "resume", "sample", "train"]

if TYPE_CHECKING:
    from texforce_cli.api import resume, sample, train
    from texforce_cli.errors import TexforceError


def __getattr__(name: str) -> Any:
    # imported when asked for: `texforce --version` must not wait for torch
    if name == "TexforceError":
        from texforce_cli.errors import TexforceError

        return TexforceError
    if name in __all__:
        from texforce_cli import api

        return getattr(api, name)
    raise AttributeError(f"module 'texforce_cli' has no attribute '{name}'")
