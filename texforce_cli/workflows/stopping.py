"""Ctrl-C and SIGTERM: a request to stop at the next safe point; a second Ctrl-C stops at once.

A cluster's scheduler sends SIGTERM and kills some time later: work that will be saved within that time may go on.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

from texforce_cli.errors import Interrupted


class StopRequest:
    """Set by a signal, looked at between batches and optimiser steps.

    After SIGTERM there are `grace` seconds until the kill. A tenth of them, at most 5, is for the last writes: where they begin, even a
    pass that is under way is broken off.
    """

    def __init__(self, grace: float = 0.0) -> None:
        self._exit_code: int | None = None
        self._grace = grace - min(5.0, grace / 10)
        self._deadline = 0.0
        self._shielded = False
        self._put_off: BaseException | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while this block runs, where the main thread allows it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        numbers = [signal.SIGINT, signal.SIGTERM, *([signal.SIGALRM] if self._grace and _ALARMS else [])]
        previous = {number: signal.signal(number, self._asked) for number in numbers}
        try:
            yield
        finally:
            self._break_off_in(0)
            for number, handler in previous.items():
                signal.signal(number, handler)
            self._exit_code = None  # what comes after this block is not to be stopped

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """What would be broken off within this block is broken off at its end."""
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        if self._put_off is not None:
            raise self._put_off

    def _break_off_in(self, seconds: float) -> None:
        """0: never."""
        if self._grace and _ALARMS:
            signal.setitimer(signal.ITIMER_REAL, seconds)

    def _raise(self, error: BaseException) -> None:
        if not self._shielded:
            raise error
        self._put_off = error

    def check(self, saved_in: float = float("inf")) -> None:
        """Raise Interrupted when a stop was asked for, unless what is under way will be saved in time (in seconds)."""
        if self._exit_code is not None and time.monotonic() + saved_in > self._deadline:
            self._break_off_in(0)  # all that is still done is to save
            raise Interrupted("stopped", exit_code=self._exit_code)

    def heed(self) -> None:
        """As `check`, while nothing can be done but wait for others who do not count on this process."""
        if not self._shielded:
            self.check(saved_in=0.0)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if number not in (signal.SIGINT, signal.SIGTERM):  # the time is over
            self._raise(Interrupted("stopped", exit_code=143))
            return
        if self._exit_code is not None and number == signal.SIGINT:
            self._raise(KeyboardInterrupt())
            return
        if number == signal.SIGTERM and self._grace and self._exit_code is None:
            self._deadline = time.monotonic() + self._grace
            self._break_off_in(self._grace)
        elif number == signal.SIGINT:
            self._deadline = 0.0
        self._exit_code = 130 if number == signal.SIGINT else 143


_ALARMS = hasattr(signal, "setitimer")  # not on Windows
