"""A limit that holds: the worst that a request can cost is set aside before it is sent."""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from fractions import Fraction
from types import TracebackType
from typing import Protocol, runtime_checkable

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.judging.judge import Repair
from texforce_cli.judging.ledger import Ledger
from texforce_cli.judging.prices import UNKNOWN_PICTURE, Price, Size, Usage
from texforce_cli.judging.questions import Question

_WAIT = 0.1
"""Seconds between two looks at whether the user asked to stop."""


class Exhausted(TexforceError):
    """The next request might go over the limit, and no other is on its way that could turn out cheaper."""


@runtime_checkable
class Metered(Protocol):
    """A judge that can say how large a request will be: needed for a limit in dollars."""

    def size(self, question: Question, repairs: tuple[Repair, ...] = ()) -> Size:
        """The size of what `ask` would send."""
        ...


class Budget:
    """What may be spent, shared by all threads. Without limits it counts what is spent.

    What earlier runs spent is in the `ledger` and counts too; without one the limits are for this run.

    A token is at least one byte of text, so that bytes bound tokens; a picture is reckoned as the most that is published
    or was ever measured (`picture_tokens` by earlier runs). While measured usage stays within that, `spent` and `reserved` together never pass `max_cost`.

    Raises:
        UsageError: a limit in dollars without a price.
    """

    def __init__(
        self,
        max_cost: float | None = None,
        max_requests: int | None = None,
        price: Price | None = None,
        ledger: Ledger | None = None,
        picture_tokens: int = 0,
    ) -> None:
        if max_cost is not None and price is None:
            raise UsageError(
                "the price of this model is not known, so that a limit in dollars cannot be kept",
                "give it with --price, or limit the requests instead",
            )
        if max_cost is not None and not math.isfinite(max_cost):
            raise UsageError(f"the limit of {max_cost} dollars is none", "leave --max-cost out")
        if max_cost is not None and price and price.input and price.image_tokens is None:
            raise UsageError(
                "a limit in dollars cannot be kept without the most tokens that a picture may be counted as",
                "give them too: --price IN,OUT,IMAGE",
            )
        self.price = price
        self.max_cost = max_cost
        self._max_cost = None if max_cost is None else Fraction(max_cost)
        self._max_requests = max_requests
        self._picture = max(picture_tokens, price.picture if price else UNKNOWN_PICTURE)
        self._ledger = ledger
        before = ledger.before if ledger else Usage()
        self._spent = self.cost(before.input_tokens, before.output_tokens)
        self._reserved = Fraction(0)
        self._in_flight = 0
        self._requests = before.requests
        self._changed = threading.Condition()

    @property
    def spent(self) -> float:
        """US dollars; 0 where no price is known."""
        with self._changed:
            return float(self._spent)

    @property
    def reserved(self) -> float:
        """US dollars that the requests in flight may still cost."""
        with self._changed:
            return float(self._reserved)

    @property
    def kept(self) -> bool:
        """Whether it counts what other runs spent."""
        return self._ledger is not None

    @property
    def requests(self) -> int:
        """The requests that were sent or are about to be."""
        with self._changed:
            return self._requests

    def cost(self, input_tokens: int, output_tokens: int) -> Fraction:
        """US dollars of so many tokens; 0 where no price is known."""
        return self.price.exact(input_tokens, output_tokens) if self.price else Fraction(0)

    def worst(self, size: Size) -> Fraction:
        """The most US dollars that a request can cost, by what is known so far."""
        return self.cost(*self._most(size))

    def _most(self, size: Size) -> tuple[int, int]:
        return size.text_bytes + size.pictures * self._picture, size.output_tokens

    def reserve(self, size: Size, check: Callable[[], None] = lambda: None) -> Reservation:
        """Set the worst case aside, waiting for requests in flight where it does not fit yet.

        Raises:
            Exhausted: it will not fit.
            Whatever `check` raises, which is called while this waits.
        """
        while True:
            check()
            with self._changed:
                if self._max_requests is not None and self._requests >= self._max_requests:
                    raise Exhausted(f"the limit of {self._max_requests} requests is reached")
                worst = self.worst(size)
                if self._max_cost is None or self._spent + self._reserved + worst <= self._max_cost:
                    self._reserved += worst
                    self._requests += 1
                    self._in_flight += 1
                    return Reservation(self, size, worst, self._most(size))
                if not self._in_flight:
                    raise Exhausted(
                        f"the next request could cost ${float(worst):.4f}, and of the ${float(self._max_cost):.2f} "
                        f"allowed ${float(self._spent):.4f} are spent"
                    )
                self._changed.wait(_WAIT)

    def book(self, usage: Usage) -> None:
        """Write to the ledger; called by the reservation.

        Raises:
            TexforceError: it cannot be written.
        """
        if self._ledger:
            self._ledger.add(usage)

    def close(self, reservation: Reservation, sent: bool, used: tuple[int, int] | None) -> tuple[int, int]:
        """Give back what a request did not use, and say what it did; called by the reservation, once."""
        billed = (0, 0)
        with self._changed:
            self._reserved -= reservation.worst
            self._in_flight -= 1
            if not sent:
                self._requests -= 1
            elif used is not None:
                # what a judge does not count is taken at the worst
                most = self._most(reservation.size)
                billed = used[0] or most[0], used[1] or most[1]
                self._spent += self.cost(*billed)
                if reservation.size.pictures:
                    self._picture = max(self._picture, -(-used[0] // reservation.size.pictures))
            self._changed.notify_all()
        return billed


class Reservation:
    """Money set aside for one request. Leaving the block without `settle` frees it: nothing was charged."""

    def __init__(self, budget: Budget, size: Size, worst: Fraction, tokens: tuple[int, int]) -> None:
        self._budget = budget
        self.size = size
        self.worst = worst
        self._worst_tokens = tokens
        self._sent = self._booked = False
        self._used: tuple[int, int] | None = None

    def sent(self, leaves: bool = True) -> None:
        """The request leaves now, and counts as one; or it did not leave after all.

        Raises:
            TexforceError: it cannot be written down beforehand, so that it must not leave.
        """
        if leaves and not self._booked:
            self._budget.book(Usage(1, *self._worst_tokens))
            self._booked = True
        self._sent = leaves

    def settle(self, input_tokens: int = 0, output_tokens: int = 0) -> None:
        """It was charged; without numbers, the worst case is taken for spent."""
        self._used = (max(input_tokens, 0), max(output_tokens, 0))

    def __enter__(self) -> Reservation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        billed = self._budget.close(self, self._sent, self._used)
        if self._booked:
            with contextlib.suppress(TexforceError):  # then the worst stays written, and the reply is not lost by this
                self._budget.book(Usage(int(self._sent), *billed) - Usage(1, *self._worst_tokens))
