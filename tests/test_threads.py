"""Results in order, a bounded number of them ahead."""

from __future__ import annotations

import threading
import time

import pytest

from texforce_cli import threads
from texforce_cli.threads import ahead


def test_results_come_in_order_though_the_first_takes_longest() -> None:
    def work(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0)
        return number * number

    assert list(ahead(work, range(20))) == [number * number for number in range(20)]
    assert list(ahead(work, [])) == []
    assert list(ahead(pow, [2, 3], [3, 2])) == [8, 9]


def test_no_more_than_a_few_are_made_before_they_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 64)
    for most, threads_of_them in ((1, 1), (2, 2), (50, 8)):
        begun: list[int] = []
        results = ahead(begun.append, range(100), most=most)
        next(results)
        time.sleep(0.2)
        assert len(begun) == 1 + 2 * threads_of_them  # the one that was asked for, and two for each thread
        results.close()
        assert len(begun) == 1 + 2 * threads_of_them


def test_an_error_comes_in_its_turn_and_ends_the_work() -> None:
    done: list[int] = []
    alive = threading.active_count()

    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        done.append(number)
        return number

    results = ahead(work, range(1000))
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="three"):
        next(results)
    assert len(done) < 100
    assert threading.active_count() == alive
