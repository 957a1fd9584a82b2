"""The held-out pairs: prompts with seeds that training never sees."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from texforce_cli.core.seeds import derive
from texforce_cli.prompts import Prompt, PromptSet


def heldout_pairs(prompts: PromptSet, count: int) -> tuple[list[Prompt], list[int]]:
    """`count` (prompt, seed) pairs: the first half of seen prompts, the second half of unseen ones.

    The seeds belong to no run: they are the same whatever --seed, and no training image has one of them.
    """
    half = count // 2 if prompts.unseen else 0
    seen = [_spread(prompts.seen, count - half, index) for index in range(count - half)]
    unseen = [_spread(prompts.unseen, half, index) for index in range(half)]
    return [*seen, *unseen], [derive(0, "held-out", index) for index in range(count)]


def _spread(prompts: tuple[Prompt, ...], count: int, index: int) -> Prompt:
    return prompts[index * len(prompts) // count] if len(prompts) > count else prompts[index % len(prompts)]


def enough_to_repeat(prompts: PromptSet, wanted: int) -> int | None:
    """The fewest pairs among which so many texts come more than once; None where there are not so many texts."""

    def found(count: int) -> int:
        half = count // 2 if prompts.unseen else 0
        sides = ((len(prompts.seen), count - half), (len(prompts.unseen), half))
        return sum(max(0, min(texts, places - texts)) for texts, places in sides)

    if len({prompt.text for prompt in (*prompts.seen, *prompts.unseen)}) < wanted:
        return None
    return next(count for count in itertools.count(2) if found(count) >= wanted)


def repeated(prompts: Sequence[Prompt]) -> list[list[int]]:
    """The places of each text that comes more than once."""
    places: dict[str, list[int]] = {}
    for index, prompt in enumerate(prompts):
        places.setdefault(prompt.text, []).append(index)
    return [found for found in places.values() if len(found) > 1]
