"""Ctrl-C and SIGTERM: a request to stop at the next safe point; a second Ctrl-C stops at once."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from texforce_cli.errors import Interrupted


class StopRequest:
    """Set by a signal, looked at between batches and optimiser steps."""

    def __init__(self) -> None:
        self._exit_code: int | None = None

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals while this block runs, where the main thread allows it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        previous = {number: signal.signal(number, self._asked) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    def check(self) -> None:
        """Raise Interrupted when a stop was asked for."""
        if self._exit_code is not None:
            raise Interrupted("stopped", exit_code=self._exit_code)

    def _asked(self, number: int, frame: FrameType | None) -> None:
        if self._exit_code is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._exit_code = 130 if number == signal.SIGINT else 143
