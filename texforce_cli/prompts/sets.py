"""The built-in sets: for Stable Diffusion the paper's phrases (sec. 3.1, after DPOK), for the embedded model its words.

On the embedded model every set has at least 24 seen and 8 unseen prompts of one capability, the unseen ones new
combinations of words that are seen; `animals` instead holds back 8 of its 26 animals.
"""

from __future__ import annotations

from collections.abc import Callable

from texforce_cli.presets import Family
from texforce_cli.tiny.words import ANIMALS, COLOURS, PLACES, TINTED, article, plural

Split = tuple[list[str], list[str]]

# the 45 animals of DDPO (Black et al. 2024), and eight that are not among them
_DDPO_ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep deer cow goat lion tiger bear raccoon fox wolf lizard beetle ant "
    "butterfly fish shark whale dolphin squirrel mouse rat snake turtle frog chicken duck goose bee pig turkey fly llama "
    "camel bat gorilla hedgehog kangaroo"
).split()
_OTHER_ANIMALS = ["elephant", "giraffe", "hippopotamus", "koala", "owl", "panda", "penguin", "rhinoceros"]

# of the animals that the embedded model knows, those that `animals` holds back
_TINY_UNSEEN = "horse whale tiger rabbit wolf chicken bat fish".split()
_TINY_SEEN = [animal for animal in ANIMALS if animal not in _TINY_UNSEEN]
_NUMBERS = ["two", "three", "four"]


def _animals(family: Family) -> Split:
    if family == "sd":
        return [article(animal) for animal in _DDPO_ANIMALS], [article(animal) for animal in _OTHER_ANIMALS]
    return _plain_and_photo(_TINY_SEEN), _plain_and_photo(_TINY_UNSEEN)


def _plain_and_photo(nouns: list[str]) -> list[str]:
    return [start + article(noun) for start in ("", "a photo of ") for noun in nouns]


def _combined(make: Callable[[int, int], str]) -> Split:
    """`make(noun, turn)`: each of the 29 nouns once at turn 0 (seen), every third again at turn 1 (unseen)."""
    count = len(TINTED)
    return [make(i, 0) for i in range(count)], [make(i, 1) for i in range(0, count, 3)]


def _color(family: Family) -> Split:
    if family == "sd":
        return ["A green colored rabbit"], ["A green colored cat"]
    return _combined(lambda i, turn: article(f"{COLOURS[(i + 4 * turn) % 9]} colored {TINTED[i]}"))


def _count(family: Family) -> Split:
    if family == "sd":
        return ["Four wolves in the forest"], ["Four birds in the forest"]
    return _combined(lambda i, turn: f"{_NUMBERS[(i + i // 3 + turn) % 3]} {plural(TINTED[i])}")


def _composition(family: Family) -> Split:
    if family == "sd":
        return ["A cat and a dog"], ["A cat and a cup"]
    count = len(TINTED)
    return _combined(lambda i, turn: f"{article(TINTED[i])} and {article(TINTED[(i + 1 + 4 * turn) % count])}")


def _location(family: Family) -> Split:
    if family == "sd":
        return ["A dog on the moon"], ["A lion on the moon"]
    return _combined(lambda i, turn: f"{article(TINTED[i])} {PLACES[(i + 4 * turn) % 9]}")


def _face(family: Family) -> Split:
    if family == "sd":
        return ["A complete face of a man", "A complete face of a woman"], ["A complete face of a child"]
    texts = [
        f"{start}a {who}{place}" for place in _scenes() for start in ("", "a photo of ") for who in ("man", "woman")
    ]
    return _every_fourth(texts)


def _hand(family: Family) -> Split:
    if family == "sd":
        return ["A photo of a hand"], ["A photo of two hands"]
    texts = [f"{start}a hand{place}" for place in _scenes() for start in ("", "a photo of ")]
    texts += [f"{start}{article(colour)} hand" for colour in COLOURS for start in ("", "a photo of ")]
    return _every_fourth(texts)


def _scenes() -> list[str]:
    return ["", *(f" {place}" for place in PLACES)]


def _every_fourth(texts: list[str]) -> Split:
    return [t for i, t in enumerate(texts) if i % 4 != 3], [t for i, t in enumerate(texts) if i % 4 == 3]


SETS: dict[str, Callable[[Family], Split]] = {
    "animals": _animals,
    "color": _color,
    "count": _count,
    "composition": _composition,
    "location": _location,
    "face": _face,
    "hand": _hand,
}
