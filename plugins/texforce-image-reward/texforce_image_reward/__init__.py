"""Registers the original backend of the reward `image-reward`; imports pluggy and nothing heavy."""

from __future__ import annotations

from collections.abc import Callable

import pluggy

hookimpl = pluggy.HookimplMarker("texforce")


@hookimpl
def texforce_register_rewards(register: Callable[..., None]) -> None:
    """Called once by texforce."""
    register(
        "image-reward",
        "texforce_image_reward.reward:ImageReward",
        summary="ImageReward: what people would prefer for a prompt; mean 0, deviation 1",
        licence="Apache-2.0",
        backend="original",
        api_version=1,
    )
