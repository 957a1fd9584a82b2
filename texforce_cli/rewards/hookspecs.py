"""The whole contract between texforce and a reward plugin.

A plugin is a Python package with an entry point in the group `texforce` that names a module; the module imports pluggy
and nothing of ours:

    hookimpl = pluggy.HookimplMarker("texforce")

    @hookimpl
    def texforce_register_rewards(register):
        register("sharpness", "my_package.reward:Sharpness", summary="variance of the Laplacian", api_version=1)

`register(name, factory, *, api_version, summary="", higher_is_better=True, unit="", prompts="", licence="")` takes a lazy "module:Class". The class gets its options as keyword arguments and has

    score(images, prompts, metadata) -> sequence of floats, one an image, in order

`images` is a list of RGB PIL pictures, or one uint8 array [N, height, width, 3] where the class says `input = "uint8"`;
`prompts` a list of str; `metadata` a list of dicts. An optional `close()` ends it.
"""

from __future__ import annotations

from collections.abc import Callable

import pluggy

PROJECT = "texforce"
API_VERSION = 1

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


@hookspec
def texforce_register_rewards(register: Callable[..., None]) -> None:
    """Call `register` once for each reward; import nothing heavy here."""
