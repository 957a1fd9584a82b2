"""The words of the embedded world: what the model has seen, how captions are worded, which pairs it never saw.

Prompt sets, the tools that make the weights and the measurements read them here. Pure Python.
"""

from __future__ import annotations

ANIMALS = (
    "cat dog horse monkey rabbit zebra spider bird sheep cow lion tiger bear fox wolf fish whale butterfly bee pig frog "
    "turtle snake duck chicken bat"
).split()
"""26 of the 45 animals of DDPO (Black et al. 2024)."""

PEOPLE = ["man", "woman", "hand"]
"""Faces and a hand: never tinted."""

OBJECTS = ["car", "apple", "boat"]

NOUNS = [*ANIMALS, *PEOPLE, *OBJECTS]
TINTED = [*ANIMALS, *OBJECTS]
COLOURS = ["red", "orange", "yellow", "green", "blue", "purple", "pink", "black", "white"]
PLACES = [
    "on the moon",
    "in the forest",
    "on the beach",
    "in the snow",
    "in the desert",
    "in the city",
    "in the ocean",
    "in the park",
    "at night",
]
NUMBERS = {1: "one", 2: "two", 3: "three", 4: "four"}
_PLURALS = {
    "sheep": "sheep",
    "wolf": "wolves",
    "fox": "foxes",
    "fish": "fish",
    "butterfly": "butterflies",
    "man": "men",
    "woman": "women",
}


def article(noun: str) -> str:
    """`a cat`, `an apple`."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def plural(noun: str) -> str:
    """`cats`, `wolves`."""
    return _PLURALS.get(noun, noun + "s")


def held_out(noun: str, colour: str) -> bool:
    """Whether the model has never been trained on this noun in this colour: a fifth of the pairs, one or two a noun."""
    return (2 * TINTED.index(noun) + COLOURS.index(colour)) % 5 == 0
