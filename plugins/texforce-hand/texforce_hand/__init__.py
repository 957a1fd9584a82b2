"""Registers the reward `hand`; imports pluggy and nothing heavy."""

from __future__ import annotations

from collections.abc import Callable

import pluggy

hookimpl = pluggy.HookimplMarker("texforce")


@hookimpl
def texforce_register_rewards(register: Callable[..., None]) -> None:
    """Called once by texforce."""
    register(
        "hand",
        "texforce_hand.reward:Hand",
        summary="how sure MediaPipe's palm detector is of its best cell, 0 to 1, not thresholded",
        range=(0, 1),
        prompts="hand",
        domain="photo",
        licence="Apache-2.0 (MediaPipe, code and models)",
        api_version=1,
    )
