"""Registers the reward `face-iqa`; imports pluggy and nothing heavy."""

from __future__ import annotations

from collections.abc import Callable

import pluggy

hookimpl = pluggy.HookimplMarker("texforce")


@hookimpl
def texforce_register_rewards(register: Callable[..., None]) -> None:
    """Called once by texforce."""
    register(
        "face-iqa",
        "texforce_face_iqa.reward:FaceIQA",
        summary="quality of the face nearest to the middle by TOPIQ, about 0 to 1; or any metric of pyiqa by an option",
        prompts="face",
        domain="photo",
        licence="non-commercial: PolyForm Noncommercial 1.0.0 (pyiqa), CC BY-NC-SA 4.0 (its weights)",
        api_version=1,
    )
