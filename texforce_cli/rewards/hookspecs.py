"""The whole contract between texforce and a plugin.

A plugin is a Python package with an entry point in the group `texforce` that names a module; the module imports pluggy
and nothing of ours:

    hookimpl = pluggy.HookimplMarker("texforce")

    @hookimpl
    def texforce_register_rewards(register):
        register("sharpness", "my_package.reward:Sharpness", summary="variance of the Laplacian", api_version=1)

`register(name, factory, *, api_version, **about)` takes a lazy "module:Class" and, all optional,

    summary           one line for the list
    higher_is_better  False where less is better
    unit              of the number, as in "kB"
    range             (lowest, highest) of the number
    prompts           the prompt set that goes with it where the user names none
    domain            "photo" where it knows nothing of drawings, "emoji" where only of those of the embedded model
    licence           of code and weights
    differentiable    whether the class has `score_tensor`
    backend           a name for this way to compute it, where there are several under one reward name

The class gets its options as keyword arguments, converted to the types of their annotations (bool, int, float, str, also as
`int | None`); none may be called `backend`, which chooses among the classes of one name. It has

    score(images, prompts, metadata) -> sequence of floats, one an image, in order

`images` is a list of RGB PIL pictures, or one uint8 array [N, height, width, 3] where the class says `input = "uint8"`;
`prompts` a list of str; `metadata` a list of dicts. Optional: `score_tensor(images, prompts)` for a float tensor
[N, 3, height, width] in [0, 1], with gradient; `counts`, a dict of name to number of what happened so far (pictures without
a face, say), which is logged; `close()`.
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


@hookspec
def texforce_register_judges(register: Callable[..., None]) -> None:
    """Call `register` once for each judge; import nothing heavy here."""
