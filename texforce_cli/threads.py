"""Work in threads, for what waits for a disk or computes outside Python's lock."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

R = TypeVar("R")

MOST = 8


@contextmanager
def beside(work: Callable[..., object], *arguments: Any) -> Iterator[None]:
    """Do `work` in a thread while the block runs, and wait for it; what it raises is raised at the end of the block."""
    pool = ThreadPoolExecutor(1)
    begun = pool.submit(work, *arguments)
    try:
        yield
    finally:
        pool.shutdown()
    begun.result()


@contextmanager
def ahead(work: Callable[..., R], *items: Iterable[Any], most: int = MOST) -> Iterator[Iterator[R]]:
    """What `map(work, *items)` gives, in its order, a few of the results computed in threads before they are asked for.

    A thread for each processor, 8 or `most` at most, and two results for each wait at any time: memory does not grow with the
    number of items. What `work` raises is raised in its turn; what was not begun when the block ends is never done.
    """
    threads = min(most, MOST, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(threads)

    def results() -> Iterator[R]:
        waiting: deque[Future[R]] = deque()
        for arguments in zip(*items):
            waiting.append(pool.submit(work, *arguments))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()

    try:
        yield results()
    finally:
        pool.shutdown(cancel_futures=True)
