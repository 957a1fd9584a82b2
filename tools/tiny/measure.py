"""What the judges and the model can do: accuracy of each capability, against every other value of the attribute."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from texforce_cli.core.seeds import derive
from texforce_cli.rewards.builtin.emoji import Agreement
from texforce_cli.tiny.words import COLOURS, NOUNS, NUMBERS, PLACES
from tools.tiny.world import Item, Scene, caption, draw_scene, render

Draw = Callable[[list[str]], np.ndarray]
"""Pictures uint8 (n, 64, 64, 3) of captions."""


@dataclass(frozen=True)
class Capability:
    """Scenes of one kind, and what a caption of them could also have said; `tinted` where it matters."""

    name: str
    kind: str
    alternatives: Callable[[Scene], list[Scene]]
    held: bool = False
    tinted: bool | None = None

    def scenes(self, count: int, seed: int = 3) -> list[Scene]:
        """`count` random scenes without a place unless the place is asked about."""
        result: list[Scene] = []
        rng = random.Random(derive(seed, self.name))
        while len(result) < count:
            scene = draw_scene(rng, self.kind, held=self.held)
            fits = self.tinted is None or self.tinted == any(item.colour for item in scene.items)
            if fits and (self.kind == "location" or scene.place is None):
                result.append(scene)
        return result


def _other_nouns(scene: Scene) -> list[Scene]:
    return [replace(scene, items=(Item(noun),)) for noun in NOUNS if noun != scene.items[0].noun]


def _other_places(scene: Scene) -> list[Scene]:
    return [replace(scene, place=place) for place in PLACES if place != scene.place]


def _other_colours(scene: Scene) -> list[Scene]:
    item = scene.items[0]
    return [replace(scene, items=(Item(item.noun, colour),)) for colour in COLOURS if colour != item.colour]


def _other_counts(scene: Scene) -> list[Scene]:
    return [replace(scene, items=scene.items[:1] * n) for n in NUMBERS if n != len(scene.items)]


def _other_pairs(scene: Scene) -> list[Scene]:
    left, right = scene.items
    others = [noun for noun in NOUNS if noun not in (left.noun, right.noun)]
    pairs = [(replace(left, noun=noun), right) for noun in others]
    pairs += [(left, replace(right, noun=noun)) for noun in others]
    return [replace(scene, items=items) for items in [*pairs, (left,), (right,)]]


CAPABILITIES = [
    Capability("object", "plain", _other_nouns),
    Capability("location", "location", _other_places),
    Capability("color", "color", _other_colours),
    Capability("color, held-out pairs", "color", _other_colours, held=True),
    Capability("count", "count", _other_counts),
    Capability("composition", "composition", _other_pairs, tinted=False),
    Capability("composition, tinted", "composition", _other_pairs, tinted=True),
]


def agreement(
    judge: Agreement, images: np.ndarray, scenes: Sequence[Scene], capability: Capability
) -> tuple[float, float]:
    """Share of pictures for which the judge prefers the caption of their scene to all alternatives; and mean cosine."""
    seen = torch.cat([judge.embed_images(images[i : i + 64]) for i in range(0, len(images), 64)])
    right, cosine = 0, 0.0
    for vector, scene in zip(seen, scenes, strict=True):
        captions = [caption(scene), *map(caption, capability.alternatives(scene))]
        cosines = judge.embed_prompts(captions) @ vector
        right += int(cosines.argmax()) == 0
        cosine += float(cosines[0])
    return right / len(scenes), cosine / len(scenes)


def real(scenes: Sequence[Scene], seed: int = 4) -> np.ndarray:
    """The world's own pictures of the scenes."""
    return np.stack([render(scene, random.Random(derive(seed, i))) for i, scene in enumerate(scenes)])


def table(judges: dict[str, Agreement], draws: dict[str, Draw], count: int) -> dict[str, dict[str, dict[str, float]]]:
    """Source of pictures -> capability -> judge -> accuracy (and "JUDGE cosine" -> mean cosine); the source `shuffled` gives real pictures the captions of
    their neighbours, which must come out at chance."""
    result: dict[str, dict[str, dict[str, float]]] = {}
    for capability in CAPABILITIES:
        scenes = capability.scenes(count)
        pictures = real(scenes)
        sources = {"real": pictures, "shuffled": np.roll(pictures, 1, axis=0)}
        sources |= {name: draw([caption(scene) for scene in scenes]) for name, draw in draws.items()}
        for source, images in sources.items():
            row: dict[str, float] = {}
            for name, judge in judges.items():
                right, cosine = agreement(judge, images, scenes, capability)
                row |= {name: round(right, 4), f"{name} cosine": round(cosine, 4)}
            result.setdefault(source, {})[capability.name] = row
    return result
