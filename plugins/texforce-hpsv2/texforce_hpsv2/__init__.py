"""Registers the original backend of the rewards `hpsv2` and `hpsv2.1`; imports pluggy and nothing heavy."""

from __future__ import annotations

from collections.abc import Callable

import pluggy

hookimpl = pluggy.HookimplMarker("texforce")


@hookimpl
def texforce_register_rewards(register: Callable[..., None]) -> None:
    """Called once by texforce."""
    for name, factory, version in (("hpsv2", "HPSv2", "2.0"), ("hpsv2.1", "HPSv21", "2.1")):
        register(
            name,
            f"texforce_hpsv2.reward:{factory}",
            summary=f"Human Preference Score {version}: the cosine of a picture and its prompt, about 0.27",
            range=(-1.0, 1.0),
            licence="Apache-2.0",
            backend="original",
            api_version=1,
        )
