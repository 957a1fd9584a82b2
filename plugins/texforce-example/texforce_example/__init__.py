"""Registers the reward `mean-colour`; imports pluggy and nothing heavy."""

import pluggy

hookimpl = pluggy.HookimplMarker("texforce")


@hookimpl
def texforce_register_rewards(register):
    """Called once by texforce."""
    register(
        "mean-colour",
        "texforce_example.reward:MeanColour",
        summary="how near the mean colour of the picture is to one that you name",
        range=(0, 1),
        licence="Apache-2.0",
        api_version=1,
    )
