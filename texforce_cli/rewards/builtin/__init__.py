"""The rewards that need nothing but Pillow and NumPy; registered through the door that plugins use."""

from __future__ import annotations

from collections.abc import Callable

from texforce_cli.rewards.hookspecs import hookimpl

_PICTURES = "texforce_cli.rewards.builtin.pictures"


@hookimpl
def texforce_register_rewards(register: Callable[..., None]) -> None:
    """The built-in rewards."""
    register(
        "jpeg-incompressibility",
        f"{_PICTURES}:JpegIncompressibility",
        summary="size of the picture as a JPEG file, quality 95: more detail is better",
        unit="kB",
        api_version=1,
    )
    register(
        "jpeg-compressibility",
        f"{_PICTURES}:JpegCompressibility",
        summary="minus the size of the picture as a JPEG file, quality 95: plainer is better",
        unit="kB",
        api_version=1,
    )
    register(
        "brightness",
        f"{_PICTURES}:Brightness",
        summary="mean luminance, 0 (black) to 1 (white): the plainest check that learning works",
        api_version=1,
    )
