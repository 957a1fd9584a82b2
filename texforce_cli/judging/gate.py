"""One gate for all workers: when the judge asks for patience, all of them wait."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable

_LOOK = 0.2
"""Seconds between two looks at whether the user asked to stop, at most."""


class Gate:
    """When the next request may leave.

    Each storm of refusals doubles the time between two requests, each answer shortens it by a little, so that many workers
    settle near what the server allows. `first` is the shortest time to wait where the server names none (and a quarter of
    it the first spacing), `longest` the longest. Scaled down in tests.
    """

    def __init__(
        self,
        *,
        first: float = 1.0,
        longest: float = 60.0,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
        chance: Callable[[], float] = random.random,
    ) -> None:
        self._first, self._longest = first, longest
        self._clock, self._sleep, self._chance = clock, sleep, chance
        self._lock = threading.Lock()
        self._next = self._slowed = float("-inf")
        self._streak = 0
        self.spacing = 0.0
        """Seconds between two requests."""

    def wait(self, check: Callable[[], None]) -> float:
        """Return when the caller may send, and at what time that was; `busy` wants to know it.

        Raises:
            Whatever `check` raises, which is called at least 5 times a second.
        """
        while True:
            check()
            with self._lock:
                now = self._clock()
                rest = self._next - now
                if rest <= 0:
                    self._next = now + self.spacing
                    return now
            self._sleep(min(rest, _LOOK))

    def busy(self, sent: float, seconds: float | None) -> None:
        """The request that left at `sent` was turned away: nobody sends in the next `seconds`.

        Requests that were on their way together are one storm, and slow the gate once.
        """
        with self._lock:
            now = self._clock()
            if sent > self._slowed:
                self._slowed = now
                self._streak += 1
                self.spacing = min(max(2 * self.spacing, self._first / 4), self._longest)
            pause = self.backoff(self._streak - 1) if seconds is None else seconds
            self._next = max(self._next, now + pause)

    def fine(self) -> None:
        """A request was answered."""
        with self._lock:
            self._streak = 0
            self.spacing *= 0.97
            if self.spacing < self._first / 1000:
                self.spacing = 0.0

    def backoff(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row before this one: doubling, with jitter."""
        longest = min(self._first * 2.0 ** min(failures, 30), self._longest)
        return longest * (0.5 + 0.5 * self._chance())

    def pause(self, seconds: float, check: Callable[[], None]) -> None:
        """Let one worker wait, while the others go on.

        Raises:
            Whatever `check` raises.
        """
        until = self._clock() + seconds
        while (rest := until - self._clock()) > 0:
            check()
            self._sleep(min(rest, _LOOK))
