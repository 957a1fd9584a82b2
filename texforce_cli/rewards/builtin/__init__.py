"""The rewards that need no package of their own, registered through the door that plugins use."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from texforce_cli.rewards.hookspecs import hookimpl

_HERE = "texforce_cli.rewards.builtin"
_PICTURES = f"{_HERE}.pictures"
_NEGATED = (("jpeg-incompressibility", "jpeg-compressibility"),)


def with_negations(names: Iterable[str]) -> set[str]:
    """Rewards, and those that are the same with the sign turned: who was trained on one was trained on the other."""
    names = set(names)
    return names.union(*(pair for pair in _NEGATED if names & set(pair)))


@hookimpl
def texforce_register_rewards(register: Callable[..., None]) -> None:
    """The built-in rewards."""
    register(
        "jpeg-incompressibility",
        f"{_PICTURES}:JpegIncompressibility",
        summary="size of the picture as a JPEG file, quality 95: more detail is better",
        unit="kB",
        licence="Apache-2.0",
        api_version=1,
    )
    register(
        "jpeg-compressibility",
        f"{_PICTURES}:JpegCompressibility",
        summary="minus the size of the picture as a JPEG file, quality 95: plainer is better",
        unit="kB",
        licence="Apache-2.0",
        api_version=1,
    )
    register(
        "brightness",
        f"{_PICTURES}:Brightness",
        summary="mean luminance, 0 (black) to 1 (white): the plainest check that learning works",
        range=(0.0, 1.0),
        licence="Apache-2.0",
        api_version=1,
    )
    for name, factory, summary in (
        (
            "tiny-clip",
            "TinyClip",
            "how well a drawing of the embedded model agrees with its prompt: the judge to train on",
        ),
        ("tiny-judge", "TinyJudge", "the same by another judge, to measure with: nothing should be trained on it"),
    ):
        register(
            name,
            f"{_HERE}.emoji:{factory}",
            summary=summary,
            range=(-1.0, 1.0),
            licence="Apache-2.0",
            domain="emoji",
            api_version=1,
        )
    register(
        "scores-file",
        f"{_HERE}.scores_file:ScoresFile",
        summary="what a table says of each picture: the door for other tools and for people",
        licence="Apache-2.0",
        api_version=1,
    )
    register(
        "clip-score",
        f"{_HERE}.clip:ClipScore",
        summary="CLIPScore of a picture and its prompt: 2.5 * max(cosine, 0), CLIP ViT-B/32",
        range=(0.0, 2.5),
        licence="MIT",
        differentiable=True,
        api_version=1,
    )
    register(
        "pickscore",
        f"{_HERE}.clip:PickScore",
        summary="PickScore: which picture people would pick for a prompt",
        licence="MIT (code)",
        differentiable=True,
        api_version=1,
    )
    register(
        "aesthetic",
        f"{_HERE}.clip:Aesthetic",
        summary="LAION aesthetic score of a picture, about 1 to 10, whatever its prompt",
        licence="Apache-2.0; CLIP: MIT",
        differentiable=True,
        api_version=1,
    )
    for name, factory, version in (("hpsv2", "Hpsv2", "2.0"), ("hpsv2.1", "Hpsv21", "2.1")):
        register(
            name,
            f"{_HERE}.hps:{factory}",
            summary=f"Human Preference Score {version}: the cosine of a picture and its prompt, about 0.27",
            range=(-1.0, 1.0),
            licence="Apache-2.0",
            differentiable=True,
            api_version=1,
        )
    register(
        "image-reward",
        f"{_HERE}.image_reward:ImageReward",
        summary="ImageReward: what people would prefer for a prompt; mean 0, deviation 1",
        licence="Apache-2.0",
        differentiable=True,
        api_version=1,
    )
