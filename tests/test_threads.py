"""Results in order, a bounded number of them ahead."""

from __future__ import annotations

import threading
import time

import pytest

from texforce_cli import threads
from texforce_cli.threads import ahead, beside


def test_results_come_in_order_though_the_first_takes_longest() -> None:
    def work(number: int) -> int:
        time.sleep(0.05 if number == 0 else 0)
        return number * number

    with ahead(work, range(20)) as results:
        assert list(results) == [number * number for number in range(20)]
    with ahead(work, []) as results:
        assert list(results) == []
    with ahead(pow, [2, 3], [3, 2]) as results:
        assert list(results) == [8, 9]


@pytest.mark.parametrize(("most", "used"), [(1, 1), (2, 2), (50, 8)])
def test_no_more_than_a_few_are_made_before_they_are_asked_for(
    most: int, used: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threads.os, "cpu_count", lambda: 64)
    begun: list[int] = []
    expected = 1 + 2 * used  # the one that was asked for, and two for each thread
    with ahead(begun.append, range(100), most=most) as results:
        next(results)
        deadline = time.monotonic() + 30
        while len(begun) < expected and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.1)
        assert len(begun) == expected
    assert len(begun) == expected


def test_an_error_comes_in_its_turn_and_ends_the_work() -> None:
    done: list[int] = []
    alive = threading.active_count()

    def work(number: int) -> int:
        if number == 3:
            raise ValueError("three")
        done.append(number)
        return number

    with pytest.raises(ValueError, match="three"), ahead(work, range(1000)) as results:
        assert [next(results) for _ in range(3)] == [0, 1, 2]
        next(results)
    assert len(done) < 100
    assert threading.active_count() == alive


def test_no_thread_is_left_when_the_block_is_broken_off() -> None:
    alive = threading.active_count()
    with pytest.raises(KeyboardInterrupt), ahead(time.sleep, [0.01] * 1000) as results:
        for _ in results:
            raise KeyboardInterrupt
    assert threading.active_count() == alive


def test_what_is_done_beside_a_block_has_ended_with_it_and_raises_there() -> None:
    begun, go, seen = threading.Event(), threading.Event(), list[str]()

    def work() -> None:
        begun.set()
        assert go.wait(10)
        seen.append("work")

    with beside(work):
        assert begun.wait(10)  # while the block runs
        seen.append("block")
        go.set()
    assert seen == ["block", "work"]

    def fails(text: str) -> None:
        raise OSError(text)

    with pytest.raises(OSError, match="full"), beside(fails, "full"):
        seen.append("whole")
    assert seen[-1] == "whole"
    with pytest.raises(ZeroDivisionError), beside(fails, "full"):  # the block's own error comes first
        raise ZeroDivisionError
