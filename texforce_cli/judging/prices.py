"""What a token costs, for the cost that is shown beforehand and for the limit that is kept."""

from __future__ import annotations

import math
import operator
from dataclasses import astuple, dataclass
from fractions import Fraction
from typing import TypeGuard

from texforce_cli.errors import UsageError

UNKNOWN_PICTURE = 2500
"""Tokens that a picture is taken for where nobody says: more than the usual models count for one of any size.

A local model may count more; what was measured is used as soon as there is an answer.
"""

_ABSURD = 10**9
"""Nobody uses so many tokens for one answer."""


@dataclass(frozen=True)
class Size:
    """What bounds the tokens of a request: the UTF-8 bytes of all its text, its pictures, and the longest answer."""

    text_bytes: int
    pictures: int
    output_tokens: int


def is_count(value: object) -> TypeGuard[int]:
    """Whether this is a number of tokens that one answer can have used."""
    return type(value) is int and 0 <= value < _ABSURD


@dataclass(frozen=True)
class Usage:
    """What requests used: their number, and their tokens."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*map(operator.sub, astuple(self), astuple(other)))

    def at_least(self, other: Usage) -> Usage:
        """The larger of each number."""
        return Usage(*map(max, astuple(self), astuple(other)))


@dataclass(frozen=True)
class Price:
    """US dollars for a million tokens, and the most tokens that one picture is counted as (None: nobody said)."""

    input: float
    output: float
    image_tokens: int | None = None

    @property
    def picture(self) -> int:
        """The tokens to reserve for a picture."""
        return UNKNOWN_PICTURE if self.image_tokens is None else self.image_tokens

    def exact(self, input_tokens: int, output_tokens: int) -> Fraction:
        """US dollars of so many tokens, without rounding: sums of it never drift."""
        parts = Fraction(str(self.input)) * input_tokens, Fraction(str(self.output)) * output_tokens
        return sum(parts, Fraction(0)) / 1_000_000


PRICES = {
    # 85 tokens and 170 for each of at most 8 tiles
    "gpt-4o": Price(2.50, 10.00, 1445),
    "gpt-4.1": Price(2.00, 8.00, 1445),
    # 2833 tokens and 5667 for each of at most 8 tiles
    "gpt-4o-mini": Price(0.15, 0.60, 48169),
    # at most 1536 patches, each 1.62 tokens
    "gpt-4.1-mini": Price(0.40, 1.60, 2489),
}
"""As published by OpenAI in 2025, and the same in price lists of 2026; check, and override with --price. Exact names only:
dated versions may cost more."""


def parse_price(text: str) -> Price:
    """The price in 'IN,OUT' or 'IN,OUT,IMAGE_TOKENS'.

    Raises:
        UsageError: it is no such text.
    """
    parts = text.split(",")
    try:
        if len(parts) not in (2, 3):
            raise ValueError
        price = Price(float(parts[0]), float(parts[1]), int(parts[2]) if len(parts) == 3 else None)
    except ValueError:
        price = Price(-1, -1)
    if not all(math.isfinite(value) and value >= 0 for value in (price.input, price.output, price.picture)):
        raise UsageError(
            f"'{text}' is no price",
            "give US dollars for a million input and output tokens, and the most tokens of one picture if you know "
            "them: 2.50,10 or 2.50,10,1445",
        )
    return price


def price_of(model: str, given: Price | None) -> Price | None:
    """The price that was given, or else the published one; None where neither is known.

    Where a price was given without tokens of a picture, those of the model are added if they are known.
    """
    known = PRICES.get(model)
    if given is None or given.image_tokens is not None or known is None:
        return given or known
    return Price(given.input, given.output, known.image_tokens)
