"""Put all questions to a judge: each reply is on disk before it is used, and nothing on disk is asked again."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent import futures
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Literal

from texforce_cli.errors import Interrupted, TexforceError, UsageError
from texforce_cli.judging.answers import Unusable, Verdict, parse
from texforce_cli.judging.budget import Budget, Exhausted, Metered
from texforce_cli.judging.gate import Gate
from texforce_cli.judging.journal import Entry, Journal, check_reply, entry_of
from texforce_cli.judging.judge import Busy, Failed, Hopeless, Judge, Repair, Reply
from texforce_cli.judging.prices import Size, is_count
from texforce_cli.judging.questions import Question

PATIENCE = 600.0
"""Seconds without any answer after which a judge that is always busy ends the run."""
MOST_FAILURES = 5
"""So many questions in a row without an answer: something is broken, and asking on would only cost.

Questions that are turned down (not worth asking again) count once a prompt.
"""
MOST_TURNED_DOWN = 25
"""So many prompts in a row may be turned down by a judge that is known to answer: a few pictures that it will not take must
not keep it from the others."""
_MOST_TOLD = 5


@dataclass(frozen=True)
class Outcome:
    """What asking came to, in questions; the same question twice counts once. `stopped` says why it ended early, `failures`
    the first few different reasons why questions got no answer."""

    asked: int
    answered_before: int
    stopped: str | None = None
    failures: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Missing:
    """No verdict: the judge refused, was cut off before it, never answered in a usable form, or was not (or not often enough)
    asked."""

    reason: Literal["refused", "cut", "unusable", "unanswered"]


def verdicts(
    identity: str, criteria: Sequence[str], questions: Sequence[Question], journal: Journal, repairs: int = 2
) -> list[Verdict | Missing]:
    """The verdict on each question, in their order, from the journal alone."""
    found: list[Verdict | Missing] = []
    for question in questions:
        state = _state(journal.entries(question.key(identity)), question, criteria, repairs)
        found.append(Missing("unanswered") if isinstance(state, tuple) else state)
    return found


def ask_all(
    judge: Judge,
    questions: Sequence[Question],
    journal: Journal,
    *,
    budget: Budget,
    workers: int,
    repairs: int = 2,
    retries: int = 6,
    gate: Gate | None = None,
    check: Callable[[], None] = lambda: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Outcome:
    """Ask what the journal does not settle yet, with so many requests at once; `progress` gets questions done and all.

    The first request goes alone, so that a wrong key costs one. What no request settles is asked again by the next run.

    Raises:
        Interrupted: `check` raised it; the replies on their way were awaited and kept.
        TexforceError: the journal cannot be written.
        UsageError: a limit in dollars, and a judge that cannot say how large a request is.
    """
    if budget.max_cost is not None and not isinstance(judge, Metered):
        raise UsageError(
            "this judge does not say how large its requests are, so that a limit in dollars cannot be kept",
            "limit the requests instead",
        )
    distinct = {question.key(judge.identity): question for question in questions}
    run = _Run(judge, journal, budget, gate or Gate(), repairs, retries, check)
    states = [(pair, run.state(*pair)) for pair in distinct.items()]
    todo = deque(pair for pair, state in states if isinstance(state, tuple))
    before = len(distinct) - len(todo)
    progress(before, len(distinct))
    with ThreadPoolExecutor(max(workers, 1)) as pool:
        try:
            breaker = _Breaker(works=any(not isinstance(state, tuple | Missing) for _, state in states))
            _drive(run, pool, todo, max(workers, 1), breaker, lambda done: progress(before + done, len(distinct)))
        finally:
            run.stop.set()  # also where progress or Ctrl-C raised: no worker begins another request
    if run.error is not None:
        raise run.error
    return Outcome(len(run.replied), before, run.stopped, tuple(run.failures)[:_MOST_TOLD])


def _drive(
    run: _Run,
    pool: ThreadPoolExecutor,
    todo: deque[tuple[str, Question]],
    workers: int,
    breaker: _Breaker,
    progress: Callable[[int], None],
) -> None:
    """Keep the workers busy until all is asked or the run is to stop, then await those under way."""
    running: dict[Future[Failed | None], Question] = {}
    done, width = 0, 1
    while running or (todo and not run.stop.is_set()):
        while todo and len(running) < width and not run.stop.is_set():
            key, question = todo.popleft()
            running[pool.submit(run.settle, key, question)] = question
        finished, _ = futures.wait(running, timeout=0.2, return_when=futures.FIRST_COMPLETED)
        for future in finished:
            failure, question = future.result(), running.pop(future)
            if failure is None or failure.asked:
                width = workers
            if failure is not None:
                run.failures[str(failure)] = None
            if breaker.opens(failure, question.prompt_id) and not run.stop.is_set():
                run.end(f"{breaker.count} questions in a row got no answer; the last: {failure}")
            done += 1
        if finished:
            progress(done)
        run.look()


class _Breaker:
    """Sees that something is broken; `works` where the judge is known to have answered."""

    def __init__(self, works: bool) -> None:
        self._works = works
        self._failed = 0
        self._turned_down: set[str] = set()

    @property
    def count(self) -> int:
        """The questions that failed since the last answer, those that were turned down once a prompt."""
        return max(self._failed, len(self._turned_down))

    def opens(self, failure: Failed | None, prompt: str) -> bool:
        """Take note of what became of a question (None: it is settled); whether the run is to end."""
        if failure is None:
            self._works, self._failed, self._turned_down = True, 0, set()
        elif failure.retry:
            self._failed += 1
        elif failure.asked:
            self._turned_down.add(prompt)
        most = MOST_TURNED_DOWN if self._works else MOST_FAILURES
        return self._failed >= MOST_FAILURES or len(self._turned_down) >= most


class _Stopped(Exception):
    """Another worker ended the run."""


class _Run:
    """What the workers share."""

    def __init__(
        self,
        judge: Judge,
        journal: Journal,
        budget: Budget,
        gate: Gate,
        repairs: int,
        retries: int,
        check: Callable[[], None],
    ) -> None:
        self.judge, self.journal, self.budget, self.gate = judge, journal, budget, gate
        self.repairs, self.retries = repairs, retries
        self.stop = threading.Event()
        self.stopped: str | None = None
        self.error: BaseException | None = None
        self.replied: set[str] = set()
        self.failures: dict[str, None] = {}
        self.last_reply = time.monotonic()
        self._asked_to_stop = check
        self._lock = threading.Lock()

    def state(self, key: str, question: Question) -> Verdict | Missing | tuple[Repair, ...]:
        """What the journal says of a question."""
        return _state(self.journal.entries(key), question, self.judge.criteria, self.repairs)

    def settle(self, key: str, question: Question) -> Failed | None:
        """Ask until the journal holds a verdict or the attempts are used up; why, where no answer came."""
        try:
            while isinstance(state := self.state(key, question), tuple):
                reply = self._reply(question, state)
                if isinstance(reply, Failed):
                    return reply
                attempt = max((entry.attempt for entry in self.journal.entries(key)), default=-1) + 1
                self.journal.append(entry_of(key, attempt, question, reply))
                with self._lock:
                    self.replied.add(key)
            if state == Missing("cut"):
                return Failed("the answer was cut off before its verdict", retry=False)
        except _Stopped:
            pass
        except (Hopeless, Exhausted) as error:
            self.end(str(error))
        except (TexforceError, KeyboardInterrupt, SystemExit) as error:
            self.end(str(error), error)
        except Exception as error:  # the plugin boundary
            failure = TexforceError(f"the judge failed ({type(error).__name__}: {str(error)[:200]})", "repair it")
            failure.__cause__ = error
            self.end(str(failure), failure)
        return None

    def end(self, why: str, error: BaseException | None = None) -> None:
        """Let nobody send another request; the first reason is the one that is told."""
        with self._lock:
            if not self.stop.is_set():
                self.stopped, self.error = why, error
                self.stop.set()

    def look(self) -> None:
        """See whether the user asked to stop."""
        if not self.stop.is_set():
            try:
                self._asked_to_stop()
            except Interrupted as error:
                self.end(str(error), error)

    def check(self) -> None:
        """Raise where the run is to stop."""
        self.look()
        if self.stop.is_set():
            raise _Stopped

    def _reply(self, question: Question, repairs: tuple[Repair, ...]) -> Reply | Failed:
        """The reply to one attempt, or why it failed for good."""
        size = Size(0, len(question.files), 0)
        if isinstance(self.judge, Metered):
            size = self.judge.size(question, repairs)
        failures = 0
        while True:
            try:
                return self._once(question, repairs, size)
            except Busy as error:
                self._bear(error)
                continue
            except Failed as error:
                failures += 1
                if error.seconds is not None:
                    self._bear(error)
                if not error.retry or failures > self.retries:
                    return error
            self.gate.pause(self.gate.backoff(failures - 1), self.check)

    def _bear(self, error: Busy | Failed) -> None:
        """End the run where the judge asks for more patience than people have."""
        longest = f"more than {PATIENCE / 60:.0f} minutes"
        if (error.seconds or 0) > PATIENCE:
            self.end(f"{error.message}, and wants to be left alone for {longest}")
            raise _Stopped
        if time.monotonic() - self.last_reply > PATIENCE:
            self.end(f"{error.message}, for {longest}")
            raise _Stopped

    def _once(self, question: Question, repairs: tuple[Repair, ...], size: Size) -> Reply:
        """One request, with its worst cost set aside."""
        connect = getattr(self.judge, "connect", None)
        if connect:
            connect()  # where a key or a package is missing nothing leaves, and nothing counts
        with self.budget.reserve(size, self.check) as reservation:
            sent = self.gate.wait(self.check)
            reservation.sent()
            try:
                reply = self.judge.ask(question, repairs)
            except Busy as error:
                self.gate.busy(sent, error.seconds)
                raise
            except Failed as error:
                if error.charged:
                    reservation.settle()
                if not error.sent:
                    reservation.sent(False)
                if error.seconds:
                    self.gate.busy(sent, error.seconds)
                raise
            used = (value if is_count(value) else 0 for value in (reply.input_tokens, reply.output_tokens))
            if getattr(reply, "charged", True):
                reservation.settle(*used)
            check_reply(reply)
            self.last_reply = time.monotonic()
            self.gate.fine()
            return reply


def _state(
    entries: Sequence[Entry], question: Question, criteria: Sequence[str], repairs: int
) -> Verdict | Missing | tuple[Repair, ...]:
    """A verdict, why there is none, or the failed attempts after which the judge may be asked (again)."""
    failed: list[Repair] = []
    for entry in entries:
        if entry.refused:
            return Missing("refused")
        try:
            return parse(entry.text, question, criteria)
        except Unusable as error:
            failed.append(Repair(entry.text, str(error)))
    if entries and entries[-1].cut:  # a repair has the same limit
        return Missing("cut")
    return Missing("unusable") if len(failed) > repairs else tuple(failed)
