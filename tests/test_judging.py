"""Judges: what they are asked and told, what is kept of their answers, and what they may cost."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import json
import math
import random
import threading
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, PngImagePlugin

from texforce_cli.errors import Interrupted, TexforceError, UsageError
from texforce_cli.judging import asking
from texforce_cli.judging.answers import Opinion, Unusable, parse, schema
from texforce_cli.judging.asking import Missing, Outcome, ask_all, verdicts
from texforce_cli.judging.budget import Budget, Exhausted
from texforce_cli.judging.gate import Gate
from texforce_cli.judging.journal import Journal, entry_of
from texforce_cli.judging.judge import Busy, Failed, Hopeless, Repair, Reply
from texforce_cli.judging.ledger import Ledger
from texforce_cli.judging.openai_judge import OpenAIJudge
from texforce_cli.judging.openai_problems import (
    TurnedDown,
    is_about_format,
    is_refusal,
    of_connection,
    of_status,
    retry_after,
    was_read,
)
from texforce_cli.judging.openai_wire import read_chat
from texforce_cli.judging.pixels import data_url
from texforce_cli.judging.prices import Price, Size, Usage, parse_price, price_of
from texforce_cli.judging.questions import Case, Question, questions_of

pytest.importorskip("openai")
pytest.importorskip("starlette")
pytest.importorskip("uvicorn")

from judge_server import JudgeServer, Seen

KEY = "sk-test-4f9a8c71d2"
BOTH = ("aesthetic", "alignment")
VARIANTS = {"dim-variant": 40, "mid-variant": 120, "lit-variant": 220}


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)


def picture(path: Path, light: int, **how: Any) -> tuple[Path, str]:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((8, 8, 3), light, np.uint8)).save(path, **how)
    return path, hashlib.sha256(path.read_bytes()).hexdigest()


def cases(folder: Path, prompts: int = 2, variants: dict[str, int] = VARIANTS) -> list[Case]:
    """Pictures that differ in brightness, with their variant's name in a text chunk."""
    found = []
    for number in range(prompts):
        pictures = {}
        for name, light in variants.items():
            about = PngImagePlugin.PngInfo()
            about.add_text("parameters", f"made by {name}")
            pictures[name] = picture(folder / name / f"{number}.png", light + number, pnginfo=about)
        found.append(Case(f"p{number:03}", f"a cat, number {number}", 0, pictures))
    return found


def asked(folder: Path, mode: str = "pairwise", prompts: int = 2, rounds: int = 1) -> list[Question]:
    return questions_of(cases(folder, prompts), mode, rounds, 0, placebos=0)  # type: ignore[arg-type]


def judge_of(server: JudgeServer, **options: Any) -> OpenAIJudge:
    return OpenAIJudge("judge", base_url=server.url, **{"timeout": 5.0, **options})


def put(
    judge: Any, questions: list[Question], path: Path, *, budget: Budget | None = None, workers: int = 4, **options: Any
) -> tuple[Outcome, list[Any], Journal]:
    """Ask through a gate that is fifty times quicker, then read the verdicts from the disk."""
    options.setdefault("gate", Gate(first=0.02, longest=0.5))
    outcome = ask_all(judge, questions, Journal(path), budget=budget or Budget(), workers=workers, **options)
    journal = Journal(path)
    return outcome, verdicts(judge.identity, judge.criteria, questions, journal), journal


class Scripted:
    """A judge without a network: `answer` gets the question and how often it was put before."""

    identity, criteria, modes = '{"judge": "scripted"}', BOTH, ("pairwise",)

    def __init__(self, answer: Any) -> None:
        self.answer, self.calls, self._lock = answer, 0, threading.Lock()

    def ask(self, question: Question, repairs: Any = ()) -> Reply:
        with self._lock:
            self.calls += 1
        return self.answer(question, repairs)


def takes_only(prompt: str) -> Any:
    """An answer for `Scripted`: A for the questions on one prompt, and the others are turned down."""

    def answer(question: Question, repairs: Any) -> Reply:
        if question.prompt_id != prompt:
            raise Failed("not this one", retry=False)
        return says("A")

    return answer


def says(winner: str) -> Reply:
    return Reply(json.dumps({c: {"reason": "so", "winner": winner} for c in BOTH}), "m", 10, 5)


# answers


QUESTION = Question("pairwise", "p", "a cat", 0, 0, ("x", "y"), (Path("x"), Path("y")), ("1", "2"))
LISTWISE = Question("listwise", "p", "a cat", 0, 0, ("x", "y"), (Path("x"), Path("y")), ("1", "2"))
POINTWISE = Question("pointwise", "p", "a cat", 0, 0, ("x",), (Path("x"),), ("1",))


@given(
    st.one_of(
        st.text(),
        st.recursive(
            st.none() | st.booleans() | st.integers(-20, 20) | st.floats() | st.text(max_size=5),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.dictionaries(st.sampled_from(["a", "winner", "ranks", "score", "reason", "A", "B"]), inner)
            ),
        ).map(json.dumps),
    ),
    st.sampled_from([QUESTION, LISTWISE, POINTWISE]),
)
def test_whatever_a_judge_says_is_a_verdict_or_unusable(text: str, question: Question) -> None:
    try:
        verdict = parse(text, question, ("a",))
    except Unusable:
        return
    assert len(verdict["a"].ranks or verdict["a"].scores) == len(question.files)


def test_a_score_of_four_hundred_digits_is_unusable() -> None:
    with pytest.raises(Unusable):
        parse('{"a": {"score": 1' + "0" * 400 + "}}", POINTWISE, ("a",))


def test_ranks_that_tie_share_their_mean() -> None:
    question = Question("listwise", "p", "", 0, 0, ("x", "y", "z"), (Path("x"),) * 3, ("1", "2", "3"))
    verdict = parse('{"a": {"ranks": {"A": 1, "B": 1, "C": 3}}}', question, ("a",))
    assert verdict == {"a": Opinion(ranks=(1.5, 1.5, 3.0))}
    assert list(schema("listwise", "ABC", ["a"])["properties"]["a"]["properties"]) == ["reason", "ranks"]


# the journal


def test_a_torn_line_is_dropped_and_the_next_entry_stands_alone(tmp_path: Path) -> None:
    path = tmp_path / "judgments.jsonl"
    entry = entry_of("k", 0, QUESTION, says("A"))
    Journal(path).append(entry)
    whole = path.read_bytes()
    for hostile in (b"null\n", b"[1]\n", b'{"key": "k"}\n', b"\xff\xfe\n", b"[" * 9999 + b"\n", b"\n"):
        path.write_bytes(path.read_bytes() + hostile)
    path.write_bytes(path.read_bytes() + whole[:40])
    torn = path.read_bytes()
    journal = Journal(path)
    assert path.read_bytes() == torn  # reading changes nothing
    assert journal.entries("k") == [entry]
    second = entry_of("k", 1, QUESTION, Reply("half \ud800 a character\u2028", "m"))
    journal.append(second)
    assert Journal(path).entries("k") == [entry, second]
    assert path.read_bytes().endswith(b"}\n") and whole[:40] + b"{" not in path.read_bytes()


def test_a_full_disk_is_told_and_leaves_whole_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "judgments.jsonl"
    journal = Journal(path)
    journal.append(entry_of("k", 0, QUESTION, says("A")))

    def full(number: int) -> None:
        raise OSError(errno.ENOSPC, "no space")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        with pytest.raises(TexforceError, match="no space left"):
            journal.append(entry_of("k", 1, QUESTION, says("B")))
    journal.append(entry_of("k", 1, QUESTION, says("tie")))
    assert [entry.text for entry in Journal(path).entries("k")] == [says("A").text, says("tie").text]


def test_entries_from_many_threads_are_whole(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "judgments.jsonl")
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda n: journal.append(entry_of(str(n % 5), n, QUESTION, says("A"))), range(40)))
    found = Journal(journal.path).entries("3")
    assert [entry.attempt for entry in found] == [3, 8, 13, 18, 23, 28, 33, 38]


# prices and the budget


def test_prices() -> None:
    assert parse_price("2.5, 10") == Price(2.5, 10.0)
    assert price_of("gpt-4o-mini", Price(1, 2)) == Price(1, 2, 48169)
    assert price_of("gpt-4o-mini", Price(1, 2, 7)) == Price(1, 2, 7)
    assert price_of("gpt-4o-2024-05-13", None) is None
    assert Price(2, 8, 100).exact(1_000_000, 500_000) == 6
    for wrong in ("", "1", "1,2,3,4", "a,b", "-1,2", "nan,1", "1,inf", "1,2,-3", "1,2,0.5"):
        with pytest.raises(UsageError, match="is no price"):
            parse_price(wrong)


def test_a_limit_in_dollars_needs_a_price() -> None:
    with pytest.raises(UsageError, match="price"):
        Budget(max_cost=1.0)


@given(
    st.floats(1e-6, 0.05),
    st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 4), st.floats(0, 1), st.sampled_from("sfu")), max_size=40),
    st.integers(1, 4),
)
def test_spent_and_reserved_never_pass_the_limit(limit: float, requests: list[Any], width: int) -> None:
    budget = Budget(limit, None, Price(2.5, 10.0, 1445))
    open_: list[Any] = []

    def close() -> None:
        reservation, share, how = open_.pop(0)
        with reservation:
            if how != "u":
                reservation.sent()
            if how == "s":
                size = reservation.size
                reservation.settle(int(share * (size.text_bytes + size.pictures * 1445)), int(share * 300))
        assert budget.spent + budget.reserved <= limit * (1 + 1e-12)

    for text, pictures, share, how in requests:
        size = Size(text, pictures, 300)
        if len(open_) == width or (open_ and Fraction(limit) < budget._spent + budget._reserved + budget.worst(size)):
            close()
            continue
        with contextlib.suppress(Exhausted, _Waits):
            open_.append((budget.reserve(size, _not_waiting()), share, how))
        assert budget._spent + budget._reserved <= Fraction(limit)
    while open_:
        close()
    assert budget.reserved == 0


class _Waits(Exception):
    """The budget looked twice."""


def _not_waiting() -> Any:
    looks: list[int] = []

    def check() -> None:
        looks.append(1)
        if len(looks) > 1:
            raise _Waits

    return check


def test_a_request_waits_for_those_in_flight_and_then_fits() -> None:
    budget = Budget(0.001, None, Price(1.0, 0.0, 0))  # 1000 tokens
    first = budget.reserve(Size(900, 0, 0))
    done: list[float] = []
    thread = threading.Thread(target=lambda: done.append(float(budget.reserve(Size(900, 0, 0)).worst)))
    thread.start()
    time.sleep(0.05)
    assert not done
    with first:
        first.sent()
        first.settle(50, 0)
    thread.join(5)
    assert done == [0.0009]
    with pytest.raises(_Waits):
        budget.reserve(Size(900, 0, 0), _not_waiting())


def test_a_picture_is_reckoned_as_the_most_that_was_measured() -> None:
    budget = Budget(10.0, None, Price(1.0, 1.0, 100))
    with budget.reserve(Size(10, 2, 10)) as reservation:
        reservation.sent()
        reservation.settle(5001, 10)
    assert budget.worst(Size(10, 2, 10)) * 1_000_000 == 10 + 2 * 2501 + 10


def test_an_output_that_is_not_counted_costs_the_worst_of_it() -> None:
    budget = Budget(1.0, 5, Price(1.0, 1.0, 0))
    with budget.reserve(Size(100, 0, 300)) as reservation:
        reservation.sent()
        reservation.settle(40, 0)
    assert budget.spent == pytest.approx(340e-6)


def test_a_limit_needs_the_size_of_a_picture() -> None:
    with pytest.raises(UsageError, match="IN,OUT,IMAGE"):
        Budget(1.0, None, Price(1.0, 1.0))


def test_an_answer_that_is_not_counted_costs_the_worst() -> None:
    budget = Budget(1.0, 5, Price(1.0, 1.0, 0))
    with budget.reserve(Size(100, 0, 100)) as reservation:
        reservation.sent()
        reservation.settle()
    assert budget.spent == 0.0002 and budget.requests == 1
    with budget.reserve(Size(100, 0, 100)):
        pass  # never sent
    assert budget.spent == 0.0002 and budget.requests == 1


def test_the_ledger_of_a_killed_run_holds_the_worst_of_what_was_in_flight(tmp_path: Path) -> None:
    path, price = tmp_path / "ranks" / "spending.jsonl", Price(1.0, 1.0, 0)
    budget = Budget(1.0, 5, price, Ledger(path))
    with budget.reserve(Size(100, 0, 300)) as reservation:
        reservation.sent()
        reservation.settle(40, 20)
    with budget.reserve(Size(100, 0, 300)) as reservation:
        reservation.sent()
        reservation.sent(False)  # it did not leave after all
    budget.reserve(Size(100, 0, 300))  # a kill before it leaves,
    budget.reserve(Size(100, 0, 300)).sent()  # and one while it is on its way
    for torn in (
        b"",
        b'{"requests": 7',
        b'null\n[1]\n{"requests": "9"}\n{"input_tokens": 1000000000000}\n{"other": 1}\n\xff\n',
    ):
        path.write_bytes(path.read_bytes() + torn)
        ledger = Ledger(path)
        assert ledger.before == Usage(2, 140, 320)
    resumed = Budget(0.0008, 3, price, ledger)
    assert resumed.requests == 2 and resumed.spent == pytest.approx(460e-6)
    with pytest.raises(Exhausted, match=r"\$0\.0005 are spent"):
        resumed.reserve(Size(100, 0, 300))
    assert Ledger(tmp_path / "gone", Usage(2, 40, 20)).before == Usage(2, 40, 20)  # what the answers tell


def test_what_cannot_be_written_down_is_not_sent_and_no_answer_is_lost_by_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    questions, path = asked(tmp_path / "p", prompts=1), tmp_path / "spending.jsonl"
    judge = Scripted(lambda *_: says("A"))
    (tmp_path / "file").write_text("")
    with pytest.raises(TexforceError, match="written"):
        put(judge, questions, tmp_path / "j", budget=Budget(ledger=Ledger(tmp_path / "file" / "spending.jsonl")))
    assert judge.calls == 0

    def answer(question: Question, repairs: Any) -> Reply:
        path.unlink()
        path.mkdir()  # from now on nothing can be added
        return says("A")

    with pytest.raises(TexforceError, match="written"):
        put(Scripted(answer), questions, tmp_path / "j", budget=Budget(ledger=Ledger(path)), workers=1)
    assert len((tmp_path / "j").read_text().splitlines()) == 1


# the gate


class Clock:
    def __init__(self) -> None:
        self.now, self.longest = 100.0, 0.0

    def __call__(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.longest = max(self.longest, seconds)
        self.now += max(seconds, 1e-6)


def test_nobody_sends_before_the_time_that_the_judge_names() -> None:
    clock = Clock()
    gate = Gate(clock=clock, sleep=clock.sleep, chance=lambda: 1.0)
    sent = gate.wait(lambda: None)
    gate.busy(sent, 7.0)
    assert gate.wait(lambda: None) >= 107.0
    assert clock.longest <= 0.2


def test_without_a_time_the_wait_doubles_and_a_storm_counts_once() -> None:
    clock = Clock()
    gate = Gate(clock=clock, sleep=clock.sleep, chance=lambda: 1.0)
    waits = []
    for _ in range(8):
        sent = gate.wait(lambda: None)
        for _ in range(5):  # five requests that left together
            gate.busy(sent, None)
        waits.append(round(gate.wait(lambda: None) - sent))
        clock.now += 100
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60]


def test_spacing_grows_with_storms_and_shrinks_with_answers() -> None:
    clock = Clock()
    gate = Gate(clock=clock, sleep=clock.sleep)
    for _ in range(3):
        clock.now += 1
        gate.busy(gate.wait(lambda: None), 0.0)
    assert gate.spacing == 1.0
    before = gate.wait(lambda: None)
    assert gate.wait(lambda: None) - before == pytest.approx(1.0, abs=0.01)
    for _ in range(400):
        gate.fine()
    assert gate.spacing == 0


def test_twenty_a_minute_with_eight_workers_is_calm() -> None:
    """Simulated: each of 200 requests is answered at once; the server takes 20 in any 60 seconds."""
    clock = Clock()
    gate = Gate(clock=clock, sleep=clock.sleep)
    window, answered, refused = [100.0, 0], 0, 0
    while answered < 200:
        sent = gate.wait(lambda: None)
        if clock.now - window[0] >= 60:
            window = [clock.now, 0]
        window[1] += 1
        if window[1] > 20:
            refused += 1
            gate.busy(sent, window[0] + 60 - clock.now)
        else:
            answered += 1
            gate.fine()
    assert refused <= 20
    assert clock.now - 100 < 2 * 200 * 3


def test_waits_jitter_between_half_and_whole() -> None:
    assert [Gate(chance=functools.partial(float, chance)).backoff(3) for chance in (0.0, 0.5, 1.0)] == [4.0, 6.0, 8.0]


def test_a_long_wait_can_be_interrupted() -> None:
    gate = Gate()
    gate.busy(gate.wait(lambda: None), 1000.0)
    began = time.monotonic()

    def check() -> None:
        if time.monotonic() - began > 0.3:
            raise Interrupted("stopped")

    with pytest.raises(Interrupted):
        gate.wait(check)
    with pytest.raises(Interrupted):
        gate.pause(1000.0, check)
    assert time.monotonic() - began < 2


# asking, without a network


def test_order_of_completion_changes_nothing(tmp_path: Path) -> None:
    questions = asked(tmp_path / "pictures", prompts=4)

    def answer(question: Question, repairs: Any) -> Reply:
        time.sleep(random.random() * 0.02)
        return says("AB"[question.variants[0] < question.variants[1]])

    found = [put(Scripted(answer), questions, tmp_path / f"{n}.jsonl", workers=n)[1] for n in (1, 8)]
    assert found[0] == found[1] and not any(isinstance(one, Missing) for one in found[0])


def test_five_questions_in_a_row_without_an_answer_open_the_breaker(tmp_path: Path) -> None:
    def answer(question: Question, repairs: Any) -> Reply:
        raise Failed("the server broke")

    judge = Scripted(answer)
    outcome, found, journal = put(judge, asked(tmp_path / "p", prompts=5), tmp_path / "j", workers=1, retries=2)
    assert judge.calls == 5 * 3 and outcome.asked == 0
    assert outcome.stopped == "5 questions in a row got no answer; the last: the server broke"
    assert set(found) == {Missing("unanswered")} and not journal.path.exists()


def test_what_cannot_be_mended_is_not_tried_again(tmp_path: Path) -> None:
    def answer(question: Question, repairs: Any) -> Reply:
        if question.variants[0] == "dim-variant":
            raise Failed("too large", retry=False)
        return says("A")

    judge = Scripted(answer)
    questions = asked(tmp_path / "p", prompts=1)
    outcome, found, _ = put(judge, questions, tmp_path / "j", workers=1)
    assert judge.calls == len(questions) == 6 and outcome == Outcome(4, 0)
    assert found.count(Missing("unanswered")) == 2


def test_what_a_judge_will_not_take_keeps_it_from_nothing_else(tmp_path: Path) -> None:
    judge = Scripted(takes_only("p001"))
    questions = asked(tmp_path / "p", prompts=9)
    order = sorted(questions, key=lambda question: question.prompt_id != "p000")  # six in a row at the beginning
    outcome, found, _ = put(judge, order, tmp_path / "j", workers=1)
    assert outcome == Outcome(6, 0) and found.count(Missing("unanswered")) == 48
    outcome, _, _ = put(judge, order, tmp_path / "j", workers=1)  # and again, with nothing left to be answered
    assert outcome == Outcome(0, 6)


def test_a_judge_that_takes_nothing_any_more_is_given_up(tmp_path: Path) -> None:
    questions = asked(tmp_path / "p", prompts=28)
    judge = Scripted(takes_only("p000"))
    outcome, _, _ = put(judge, questions, tmp_path / "j", workers=1)
    assert judge.calls == 6 + 6 * 24 + 1 and outcome.failures == ("not this one",)
    assert outcome.stopped == "25 questions in a row got no answer; the last: not this one"


def test_a_picture_that_cannot_be_read_costs_nothing_and_is_named(tmp_path: Path) -> None:
    questions = asked(tmp_path / "p", prompts=2)
    broken = questions[0].files[0]
    broken.write_bytes(b"no picture")
    with JudgeServer("401") as server:  # the first request goes alone, whatever failed before it
        put(judge_of(server), questions, tmp_path / "j", workers=8)
    assert len(server.seen) == 1
    readable = [question for question in questions if broken not in question.files]
    with JudgeServer() as server:
        outcome, _, _ = put(judge_of(server), questions, tmp_path / "j", budget=Budget(max_requests=len(readable)))
    assert len(server.seen) == len(readable) == outcome.asked and outcome.stopped is None
    assert any(str(broken) in sentence for sentence in outcome.failures)


def test_pictures_that_cannot_be_read_say_nothing_of_the_judge(tmp_path: Path) -> None:
    questions = asked(tmp_path / "p", prompts=8)
    for question in questions:
        if question.prompt_id < "p006":
            question.files[0].write_bytes(b"no picture")
    with JudgeServer() as server:
        outcome, found, _ = put(judge_of(server), questions, tmp_path / "j", workers=1)
    assert outcome == Outcome(12, 0) and found.count(Missing("unanswered")) == 36


@pytest.mark.parametrize(
    "wrong",
    [
        {"model": None},
        {"input_tokens": 1.5},
        {"output_tokens": 10**5000},
        {"input_tokens": -1},
        {"cut": 0},
        {"text": b""},
    ],
)
def test_a_reply_that_could_not_be_read_again_is_refused(tmp_path: Path, wrong: dict[str, Any]) -> None:
    judge = Scripted(lambda *_: Reply(**{"text": "", **wrong}))
    with pytest.raises(TexforceError, match=f"for '{next(iter(wrong))}', which must be"):
        put(judge, asked(tmp_path / "p"), tmp_path / "j")
    assert not (tmp_path / "j").exists()


def test_an_interruption_keeps_the_replies_on_their_way(tmp_path: Path) -> None:
    stopped = threading.Event()

    def answer(question: Question, repairs: Any) -> Reply:
        if judge.calls > 1:
            stopped.set()
            time.sleep(0.3)
        return says("A")

    def check() -> None:
        if stopped.is_set():
            raise Interrupted("stopped", exit_code=143)

    judge = Scripted(answer)
    with pytest.raises(Interrupted) as caught:
        put(judge, asked(tmp_path / "p", prompts=5), tmp_path / "j", check=check)
    assert caught.value.exit_code == 143
    assert 1 < judge.calls <= 5  # the first, and at most four at once
    assert len((tmp_path / "j").read_text().splitlines()) == judge.calls


def test_a_fault_of_the_judge_or_the_disk_ends_the_run(tmp_path: Path) -> None:
    def answer(question: Question, repairs: Any) -> Reply:
        raise ZeroDivisionError

    judge = Scripted(answer)
    with pytest.raises(TexforceError, match=r"the judge failed \(ZeroDivisionError"):
        put(judge, asked(tmp_path / "p"), tmp_path / "j")
    assert judge.calls == 1
    (tmp_path / "file").write_text("")
    with pytest.raises(TexforceError, match="written"):
        put(Scripted(lambda *_: says("A")), asked(tmp_path / "p"), tmp_path / "file" / "j")


def test_the_same_bytes_under_two_names_are_asked_about_once(tmp_path: Path) -> None:
    same = cases(tmp_path, 1, {"x": 100})[0]
    case = Case("p", "a cat", 0, {"x": same.pictures["x"], "y": same.pictures["x"]})
    judge = Scripted(lambda *_: says("A"))
    outcome, found, _ = put(judge, questions_of([case], "pairwise", 1, 0, placebos=0), tmp_path / "j")
    assert judge.calls == 1 and outcome == Outcome(1, 0) and len(found) == 2


def test_a_limit_of_requests_holds_and_the_next_run_goes_on(tmp_path: Path) -> None:
    questions = asked(tmp_path / "p")
    judge = Scripted(lambda *_: says("A"))
    outcome, found, _ = put(judge, questions, tmp_path / "j", budget=Budget(max_requests=5))
    assert judge.calls == 5 == outcome.asked and outcome.stopped == "the limit of 5 requests is reached"
    assert found.count(Missing("unanswered")) == 7
    outcome, found, _ = put(judge, questions, tmp_path / "j")
    assert outcome == Outcome(7, 5) and judge.calls == 12


def test_a_limit_in_dollars_needs_a_judge_that_counts(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="how large"):
        put(Scripted(None), asked(tmp_path / "p"), tmp_path / "j", budget=Budget(1.0, None, Price(1, 1, 0)))


# the OpenAI API, against a server


@pytest.mark.parametrize("api", ["chat", "responses"])
@pytest.mark.parametrize("mode", ["pairwise", "listwise", "pointwise"])
def test_a_truthful_judge_finds_the_brightest(tmp_path: Path, api: str, mode: str) -> None:
    questions = asked(tmp_path / "pictures", mode)
    forbidden = [*VARIANTS, str(tmp_path), "p000", "pictures/", "made by"]
    with JudgeServer(forbidden=forbidden) as server:
        judge = judge_of(server, api=api)
        outcome, found, journal = put(judge, questions, tmp_path / "j")
    assert server.faults == [] and outcome == Outcome(len(questions), 0) and len(server.seen) == len(questions)
    assert {seen.mode for seen in server.seen} == {mode} and all(seen.schema for seen in server.seen)
    for question, verdict in zip(questions, found):
        light = [VARIANTS[name] for name in question.variants]
        for criterion in BOTH:
            opinion = verdict[criterion]
            if mode == "pointwise":
                assert opinion.scores == (float(1 + round((light[0] + int(question.prompt_id[1:])) / 255 * 9)),)
            else:
                assert int(np.argmin(opinion.ranks)) == int(np.argmax(light))
    entry = journal.entries(questions[0].key(judge.identity))[0]
    assert (entry.model, entry.input_tokens, entry.output_tokens) == ("judge-2026", 600, 50)
    kept = journal.path.read_text()
    assert KEY not in kept and str(tmp_path) not in kept


def test_a_judge_that_likes_the_first_slot_is_seen_in_the_ranks(tmp_path: Path) -> None:
    with JudgeServer("first") as server:
        _, found, _ = put(judge_of(server), asked(tmp_path / "p"), tmp_path / "j")
    assert {verdict["aesthetic"].ranks for verdict in found} == {(1.0, 2.0)}


def test_a_second_run_asks_nothing(tmp_path: Path) -> None:
    questions = asked(tmp_path / "p")
    with JudgeServer() as server:
        _, first, _ = put(judge_of(server), questions, tmp_path / "j")
        count = len(server.seen)
        outcome, second, _ = put(judge_of(server), questions, tmp_path / "j")
    assert len(server.seen) == count and outcome == Outcome(0, len(questions)) and first == second


def test_eight_workers_in_a_storm_of_429_lose_nothing(tmp_path: Path) -> None:
    questions = asked(tmp_path / "p", prompts=6)  # 36
    with JudgeServer(limit=(8, 0.3)) as server:
        outcome, found, _ = put(judge_of(server), questions, tmp_path / "j", workers=8)
    assert outcome == Outcome(36, 0) and not any(isinstance(one, Missing) for one in found)
    assert 1 <= server.refused_by_limit <= 36


@pytest.mark.slow
def test_twenty_requests_a_minute_with_eight_workers_lose_nothing(tmp_path: Path) -> None:
    questions = asked(tmp_path / "p", prompts=12)  # 72: four windows
    began = time.monotonic()
    with JudgeServer(limit=(20, 60.0)) as server:
        outcome, found, _ = put(judge_of(server), questions, tmp_path / "j", workers=8)
    print(f"{time.monotonic() - began:.0f} s, {server.refused_by_limit} refused")
    assert outcome == Outcome(72, 0) and not any(isinstance(one, Missing) for one in found)
    assert server.refused_by_limit <= 3 * 8  # nobody hammers: at most each worker once, each time the limit is met


def test_so_many_requests_at_once_as_there_are_workers(tmp_path: Path) -> None:
    with JudgeServer("slow") as server:
        put(judge_of(server), asked(tmp_path / "p", prompts=1), tmp_path / "j", workers=3)
    assert server.most_at_once == 3 and len(server.seen) == 6


@pytest.mark.parametrize(
    ("how", "code"),
    [("401", "not let us in"), ("404", "no such model"), ("quota", "no credit"), ("400 key", "API key not valid")],
)
def test_what_is_hopeless_costs_one_request(tmp_path: Path, how: str, code: str) -> None:
    with JudgeServer(how) as server:
        outcome, found, _ = put(judge_of(server), asked(tmp_path / "p"), tmp_path / "j", workers=8)
    assert len(server.seen) == 1 and outcome.asked == 0 and outcome.stopped is not None
    assert code in outcome.stopped and KEY not in outcome.stopped
    assert set(found) == {Missing("unanswered")}


@pytest.mark.parametrize("how", ["500", "503", "429", "cut", "html"])
def test_a_question_is_asked_again_after_trouble(tmp_path: Path, how: str) -> None:
    questions = asked(tmp_path / "p", prompts=1)

    def script(seen: Seen) -> str:
        return how if seen.number % 2 == 0 else "truthful"

    with JudgeServer(script) as server:
        outcome, found, journal = put(judge_of(server), questions, tmp_path / "j", workers=1)
    assert outcome == Outcome(6, 0) and not any(isinstance(one, Missing) for one in found)
    assert len(server.seen) == 12 and len(journal.path.read_text().splitlines()) == 6


@pytest.mark.parametrize("how", ["500 later", "429 later"])
def test_nobody_asks_again_before_the_time_that_the_server_names(tmp_path: Path, how: str) -> None:
    with JudgeServer(lambda seen: how if seen.number == 0 else "truthful") as server:
        outcome, found, _ = put(judge_of(server), asked(tmp_path / "p", prompts=1)[:1], tmp_path / "j", retries=1)
    assert outcome == Outcome(1, 0) and not isinstance(found[0], Missing)
    assert server.times[1] - server.times[0] >= 0.95


def test_an_answer_that_drips_is_given_up_in_time(tmp_path: Path) -> None:
    began = time.monotonic()
    with JudgeServer("drip") as server, pytest.raises(Failed, match=r"no whole answer within 0\.5 s") as caught:
        judge_of(server, timeout=0.5).ask(asked(tmp_path / "p", prompts=1)[0])
    assert time.monotonic() - began < 10 and caught.value.charged


def test_an_error_that_drips_is_given_up_in_time_and_keeps_its_meaning(tmp_path: Path) -> None:
    began = time.monotonic()
    with JudgeServer("401 drip") as server, pytest.raises(Hopeless, match="does not let us in"):
        judge_of(server, timeout=0.5).ask(asked(tmp_path / "p", prompts=1)[0])
    assert time.monotonic() - began < 10


def test_an_error_without_an_end_is_not_read_to_it(tmp_path: Path) -> None:
    began = time.monotonic()
    with JudgeServer("500 flood") as server, pytest.raises(Failed, match="could not answer") as caught:
        judge_of(server, timeout=60.0).ask(asked(tmp_path / "p", prompts=1)[0])
    assert time.monotonic() - began < 10 and caught.value.retry


def test_pictures_go_to_no_other_address_than_the_one_that_was_given(tmp_path: Path) -> None:
    with JudgeServer("moved") as server, pytest.raises(Hopeless, match=r"moved to http://127\.0\.0\.1:9") as caught:
        judge_of(server).ask(asked(tmp_path / "p", prompts=1)[0])
    assert len(server.seen) == 1 and caught.value.hint == "check the model's name and --base-url"


def test_a_time_out_is_asked_again(tmp_path: Path) -> None:
    with JudgeServer(lambda seen: "slow" if seen.number == 0 else "truthful") as server:
        budget = Budget(1.0, None, Price(1, 1, 100))
        judge = judge_of(server, timeout=0.1)
        outcome, _, _ = put(judge, asked(tmp_path / "p", prompts=1)[:1], tmp_path / "j", budget=budget)
    assert outcome == Outcome(1, 0) and len(server.seen) == 2
    assert budget.spent > budget.cost(1000 + 600, 1000)  # the lost answer may have cost


def test_an_error_that_comes_as_a_success_is_told(tmp_path: Path) -> None:
    with JudgeServer("error as success") as server, pytest.raises(Failed, match=r"form \(the provider is down\)"):
        judge_of(server).ask(asked(tmp_path / "p", prompts=1)[0])


def test_fenced_json_is_read(tmp_path: Path) -> None:
    with JudgeServer("fenced") as server:
        _, found, _ = put(judge_of(server), asked(tmp_path / "p"), tmp_path / "j")
    assert not any(isinstance(one, Missing) for one in found)


@pytest.mark.parametrize("how", ["truncated", "wrong", "duplicate", "free"])
def test_an_unusable_answer_is_repaired_at_most_twice(tmp_path: Path, how: str) -> None:
    questions = asked(tmp_path / "p", prompts=1)
    with JudgeServer(how) as server:
        outcome, found, journal = put(judge_of(server), questions, tmp_path / "j")
        assert len(server.seen) == 18 and sorted({seen.attempt for seen in server.seen}) == [0, 1, 2]
        put(judge_of(server), questions, tmp_path / "j")
        assert len(server.seen) == 18 and server.faults == []
    assert set(found) == {Missing("unusable")} and outcome == Outcome(6, 0)
    entries = journal.entries(questions[0].key(judge_of(server).identity))
    assert [entry.attempt for entry in entries] == [0, 1, 2] and not entries[0].cut


@pytest.mark.parametrize("api", ["chat", "responses"])
def test_a_repair_helps(tmp_path: Path, api: str) -> None:
    with JudgeServer(lambda seen: "truthful" if seen.attempt else "truncated") as server:
        _, found, _ = put(judge_of(server, api=api), asked(tmp_path / "p"), tmp_path / "j")
    assert not any(isinstance(one, Missing) for one in found) and server.faults == []


@pytest.mark.parametrize("how", ["refusal", "filtered", "moderated"])
@pytest.mark.parametrize("api", ["chat", "responses"])
def test_a_refusal_is_final_and_counted(tmp_path: Path, how: str, api: str) -> None:
    questions = asked(tmp_path / "p")

    def script(seen: Seen) -> str:
        return how if seen.prompt == "a cat, number 1" else "truthful"

    with JudgeServer(script) as server:
        for _ in range(2):
            _, found, _ = put(judge_of(server, api=api), questions, tmp_path / "j")
            assert len(server.seen) == len(questions)
    assert [found.count(Missing("refused")), sum(isinstance(one, dict) for one in found)] == [6, 6]


def test_what_is_turned_away_unread_costs_nothing(tmp_path: Path) -> None:
    budget = Budget(1.0, None, Price(10.0, 100.0, 400))
    with JudgeServer("moderated") as server:
        _, found, _ = put(judge_of(server), asked(tmp_path / "p"), tmp_path / "j", budget=budget)
    assert set(found) == {Missing("refused")} and len(server.seen) == len(found) == budget.requests
    assert budget.spent == 0


def test_without_a_key_nothing_is_asked_and_nothing_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    budget = Budget(None, 1)
    with pytest.raises(UsageError, match="there is no key"):
        put(OpenAIJudge("judge"), asked(tmp_path / "p"), tmp_path / "j", budget=budget, workers=1)
    assert budget.requests == 0


def test_a_limit_in_dollars_holds_under_concurrency(tmp_path: Path) -> None:
    questions = asked(tmp_path / "p", prompts=10)
    price = Price(10.0, 100.0, 400)
    with JudgeServer() as server:
        budget = Budget(0.30, None, price)
        outcome, _, _ = put(judge_of(server), questions, tmp_path / "j", workers=8, budget=budget)
    charged = float(len(server.seen) * price.exact(600, 50))
    assert 0.1 < charged <= 0.30 and budget.spent == pytest.approx(charged)
    assert outcome.stopped is not None and "$0.30" in outcome.stopped and outcome.asked == len(server.seen) < 60


def test_the_size_of_a_request_bounds_all_its_text(tmp_path: Path) -> None:
    questions = asked(tmp_path / "p", "listwise")
    with JudgeServer() as server:
        judge = judge_of(server)
        assert judge.size(questions[0]).pictures == 3
        assert (
            judge.size(questions[0], [Repair("x" * 500, "no")]).text_bytes > judge.size(questions[0]).text_bytes + 500
        )
        body = judge._body(judge._form, questions[0], (), lambda *_: "")
        assert judge.size(questions[0]).text_bytes == len(json.dumps(body, ensure_ascii=False).encode())


def test_a_server_without_schemas_is_asked_in_words(tmp_path: Path) -> None:
    questions = asked(tmp_path / "p")
    with JudgeServer("schemaless") as server:
        judge = judge_of(server)
        outcome, found, _ = put(judge, questions, tmp_path / "j")
    assert [seen.schema for seen in server.seen] == [True] + [False] * len(questions)
    assert len(judge.notes) == 1 and "schema" in judge.notes[0]
    assert outcome == Outcome(len(questions), 0) and not any(isinstance(one, Missing) for one in found)


def test_a_request_that_the_server_cannot_read_is_not_repeated(tmp_path: Path) -> None:
    with JudgeServer("400") as server:
        outcome, _, _ = put(judge_of(server), asked(tmp_path / "p", prompts=7), tmp_path / "j", workers=1)
    # six questions a prompt, and those of one prompt count once
    assert len(server.seen) == 6 * (asking.MOST_FAILURES - 1) + 1 and outcome.stopped is not None
    assert "pictures are not supported" in outcome.stopped


def test_no_server_is_told_after_retries(tmp_path: Path) -> None:
    with JudgeServer() as server:
        pass
    outcome, _, _ = put(judge_of(server), asked(tmp_path / "p"), tmp_path / "j", retries=1)
    assert outcome.stopped is not None and "the connection failed" in outcome.stopped


# the key


@pytest.mark.parametrize("how", ["401", "500", "echo", "echo escaped"])
def test_the_key_reaches_no_message_no_traceback_and_no_file(tmp_path: Path, how: str) -> None:
    question = asked(tmp_path / "p")[0]
    with JudgeServer(how) as server:
        judge = judge_of(server)
        try:
            said = judge.ask(question).text
        except (Hopeless, Failed) as error:
            said = "".join(traceback.format_exception(error)) + repr(error) + str(error.__context__)
        put(judge, [question], tmp_path / "j", retries=0)
        assert server.seen[0].key == KEY
    assert said and KEY not in said and KEY not in judge.identity and KEY not in repr(judge)
    kept = (tmp_path / "j").read_text() if (tmp_path / "j").exists() else ""
    assert KEY not in kept and KEY not in kept.encode("ascii").decode("unicode_escape")


def test_a_key_is_needed_beyond_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENAI_API_KEY")
    OpenAIJudge("m", base_url="http://127.0.0.1:9/v1").connect()
    with pytest.raises(UsageError, match="set OPENAI_API_KEY"):
        OpenAIJudge("m").connect()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\u00e9\n")
    with pytest.raises(UsageError, match="characters") as caught:
        OpenAIJudge("m").connect()
    assert "sk-" not in str(caught.value)


def test_what_answers_depend_on_is_in_the_identity() -> None:
    def made(**options: Any) -> str:
        return OpenAIJudge(options.pop("model", "m"), **options).identity

    others = [
        made(model="n"),
        made(api="responses"),
        made(base_url="http://me:secret@localhost:8000/v1"),
        made(criteria="alignment"),
        made(max_output_tokens=7),
        made(detail="low"),
    ]
    assert len({made(), *others}) == 7 and made() == made(timeout=1.0) and "secret" not in "".join(others)
    for wrong in ({"api": "other"}, {"base_url": "localhost:8000"}, {"base_url": "http://["}, {"max_output_tokens": 0}):
        with pytest.raises(UsageError):
            made(**wrong)


# pictures


def test_only_pixels_are_sent(tmp_path: Path) -> None:
    import base64

    def shown(path: Path) -> bytes:
        url = data_url(path, hashlib.sha256(path.read_bytes()).hexdigest())
        return base64.b64decode(url.removeprefix("data:image/png;base64,"))

    bare, _ = picture(tmp_path / "bare.png", 9)
    assert shown(bare) == bare.read_bytes()
    exif = Image.Exif()
    exif[0x010E], exif[0x0112] = "a secret", 6
    tall = Image.fromarray(np.arange(8 * 4 * 3, dtype=np.uint8).reshape(8, 4, 3))
    for name in ("e.png", "e.jpg", "e.webp"):
        path = tmp_path / name
        tall.save(path, exif=exif, icc_profile=b"a secret profile")
        image = Image.open(io.BytesIO(shown(path)))
        assert image.size == (8, 4) and not image.info and b"secret" not in shown(path)  # upright
    (tmp_path / "tail.png").write_bytes(bare.read_bytes() + b"a secret")
    assert shown(tmp_path / "tail.png").endswith(b"IEND\xaeB`\x82")
    (tmp_path / "no.png").write_bytes(b"no picture")
    for path, sha256 in ((tmp_path / "no.png", None), (tmp_path / "absent.png", "1"), (bare, "another")):
        with pytest.raises(Failed) as caught:
            data_url(path, sha256 or hashlib.sha256(path.read_bytes()).hexdigest())
        assert not caught.value.retry


# what a refusal means


def test_how_long_to_wait() -> None:
    assert retry_after({"retry-after": "3"}, 0.0) == 3.0
    assert retry_after({"retry-after-ms": "250", "retry-after": "3"}, 0.0) == 0.25
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:01:00 GMT"}, 20.0) == 40.0
    assert retry_after({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 20.0) == 0.0
    for odd in ({}, {"retry-after": "soon"}, {"retry-after": "nan"}, {"retry-after": "inf"}):
        assert retry_after(odd, 0.0) is None


def test_statuses() -> None:
    meant = {
        status: of_status(status, {}, None, "said") for status in (400, 401, 402, 403, 404, 413, 429, 500, 503, 504)
    }
    assert {s for s, m in meant.items() if isinstance(m, Hopeless)} == {401, 402, 403, 404}
    assert {s for s, m in meant.items() if isinstance(m, Busy)} == {429, 503}
    assert {s for s, m in meant.items() if isinstance(m, Failed) and m.retry} == {500, 504}
    assert {s for s, m in meant.items() if isinstance(m, Failed) and m.charged} == {504}
    assert isinstance(failed := of_status(500, {"retry-after": "7"}, None, "said"), Failed) and failed.seconds == 7
    assert isinstance(of_status(429, {}, {"error": {"type": "insufficient_quota"}}, ""), Hopeless)


def test_a_missing_bundle_of_certificates_is_told_in_a_sentence() -> None:
    error = ConnectionError("x")
    error.__cause__ = OSError("[SSL: CERTIFICATE_VERIFY_FAILED] unable to get local issuer certificate")
    problem = of_connection(error, False)
    assert isinstance(problem, Hopeless) and "ca-certificates" in str(problem) and math.isfinite(len(str(problem)))


@pytest.mark.parametrize(
    ("status", "code", "said", "refused"),
    [
        (400, "content_filter", "no", True),
        (400, None, "Your request was flagged as potentially violating our usage policy", True),
        (403, None, "Your input was flagged by moderation", True),
        (403, None, "Your account is limited, since it was flagged for violating our usage policy", False),
        (400, "invalid_prompt", "Invalid Responses API request", False),
        (400, None, "could not parse 'a moderately large ship'", False),
        (500, None, "the moderation is down", False),
    ],
)
def test_what_is_a_refusal_to_look_at_this(status: int, code: str | None, said: str, refused: bool) -> None:
    assert is_refusal(status, {"error": {"code": code}}, said) is refused
    assert was_read({"error": {"code": code}}) is (code == "content_filter")  # Azure's filter is paid for what it reads


def test_all_workers_wait_the_time_that_a_broken_server_names(tmp_path: Path) -> None:
    with JudgeServer(lambda seen: "500 later" if seen.number == 1 else "slow") as server:
        outcome, _, _ = put(judge_of(server), asked(tmp_path / "p"), tmp_path / "j", workers=3)
    assert outcome == Outcome(12, 0)
    told = server.times[1]  # the first request goes alone; of the next three the first breaks
    assert sum(at - told < 0.95 for at in server.times[1:]) <= 3


def test_a_wait_that_is_too_long_ends_the_run(tmp_path: Path) -> None:
    def broken(retry: bool, question: Question, repairs: Any) -> Reply:
        raise Failed("broken", retry=retry, seconds=3600.0)

    for retry in (True, False):  # and nobody waits at the gate for that long
        judge = Scripted(functools.partial(broken, retry))
        outcome, _, _ = put(judge, asked(tmp_path / "p"), tmp_path / "j", workers=1)
        assert outcome.stopped == "broken, and wants to be left alone for more than 10 minutes" and judge.calls == 1


def test_the_key_is_looked_for_in_linear_time() -> None:
    judge = OpenAIJudge("m", base_url="http://127.0.0.1:9/v1")
    judge.connect()
    # more than half an hour, where every backslash begins a try of its own
    assert judge._without_key("\\" * 300_000) == "\\" * 300_000
    assert judge._without_key("\\" * 300_000 + KEY).endswith("(key)")


def test_tokens_that_nobody_can_have_used_are_not_counted() -> None:
    answer = {
        "choices": [{"message": {"content": "x"}}],
        "usage": {"prompt_tokens": 10**400, "completion_tokens": True},
    }
    assert read_chat(answer)[2] == (0, 0)


@pytest.mark.parametrize(("total", "output"), [(103, 94), (10, 1), (None, 1), (-5, 1)])
def test_what_a_model_thinks_is_paid_for_where_the_total_alone_tells_it(total: int | None, output: int) -> None:
    """Gemini and Grok leave it out of the completion's tokens."""
    usage = {"prompt_tokens": 9, "completion_tokens": 1, "total_tokens": total}
    assert read_chat({"choices": [{"message": {"content": "x"}}], "usage": usage})[2] == (9, output)


def test_all_that_the_server_sent_is_kept(tmp_path: Path) -> None:
    with JudgeServer() as server:
        _, _, journal = put(judge_of(server), asked(tmp_path / "p", prompts=1)[:1], tmp_path / "j")
    row = json.loads((tmp_path / "j").read_text())
    assert json.loads(row["raw"])["choices"][0]["message"]["content"] == row["text"]
    del row["raw"]  # as an earlier version wrote it
    (tmp_path / "old").write_text(json.dumps(row) + "\n")
    assert Journal(tmp_path / "old").entries(row["key"])[0].text == journal.entries(row["key"])[0].text


def test_half_an_emoji_in_a_reason_can_be_written() -> None:
    text = '{"a": {"reason": "cut \\ud83d", "winner": "A"}}'
    question = Question("pairwise", "p", "", 0, 0, ("x", "y"), (Path("x"), Path("y")), ("1", "2"))
    assert parse(text, question, ("a",))["a"].reason.encode("utf-8") == b"cut ?"


def test_what_a_model_thinks_aloud_is_passed_over_at_once() -> None:
    question = Question("pairwise", "p", "", 0, 0, ("x", "y"), (Path("x"), Path("y")), ("1", "2"))
    text = '<think>maybe {"a": {"winner": "B"}}</think> {"a": {"reason": "", "winner": "A"}}'
    assert parse(text, question, ("a",))["a"].ranks == (1.0, 2.0)
    began = time.monotonic()
    for hostile in ("<think>" * 40_000, "```{" * 25_000, "```" + " " * 90_000, '{"a":' * 20_000):
        with pytest.raises(Unusable):
            parse(hostile, question, ("a",))
    assert time.monotonic() - began < 2


def test_of_two_answers_none_is_chosen() -> None:
    first, again, second = (
        '{"a": {"reason": "", "winner": "A"}}',
        '{"a": {"reason": "see ```{ and {", "winner": "A"}}',
        '{"a": {"reason": "", "winner": "B"}}',
    )
    two = (
        first + second,
        f"```json\n{first}\n```\nNo, wait:\n```json\n{second}\n```",
        f"{first} {{so}} {second}",
        first + first + second,
        first + '{"a": {"winner": "B"}, "more": 1}',
    )
    for text in two:
        with pytest.raises(Unusable, match="two answers"):
            parse(text, QUESTION, ("a",))
    for text in (
        first + first,
        first + again,
        again,
        first + " {so}",
        f"{first} of {{}}",
        f"{first} and " + '{"b": 1}',
    ):
        assert parse(text, QUESTION, ("a",))["a"].ranks == (1.0, 2.0)
    for half in (first + '{"a": {}}', first + '{"a": 1}'):
        with pytest.raises(Unusable):
            parse(half, QUESTION, ("a",))


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"error": {"message": "no such thing"}}', "no such thing"),
        ('{"error": "no such thing"}', "no such thing"),
        ('[{"error": {"message": "no such thing"}}]', "no such thing"),
        ('{"detail": "no such thing"}', "no such thing"),
        ('{"detail": [{"loc": ["body", "response_format"]}]}', "response_format"),
        ("response_format is unknown", "response_format"),
        ("<html>Bad gateway</html>", "Error code: 422"),
        ("[1]", "Error code: 422"),
    ],
)
def test_the_errors_of_many_servers_are_told(body: str, said: str) -> None:
    found = TurnedDown(422, {}, body.encode())
    assert said in found.said and "<html>" not in found.said
    assert is_about_format(found.said, found.body) is ("response_format" in body)


def test_a_server_that_is_not_there_uses_up_no_request(tmp_path: Path) -> None:
    import httpx2

    def nobody(question: Question, repairs: Any) -> Reply:
        raise of_connection(httpx2.ConnectError("refused"), False)

    budget = Budget(max_requests=3, ledger=Ledger(tmp_path / "spending.jsonl"))
    gate = Gate(first=0.001, longest=0.001)
    outcome = ask_all(
        Scripted(nobody), asked(tmp_path / "p"), Journal(tmp_path / "j"), budget=budget, workers=2, gate=gate
    )
    assert "connection failed" in str(outcome.stopped) and budget.requests == 0
    assert Ledger(tmp_path / "spending.jsonl").before == Usage()


def test_what_the_answers_tell_of_earlier_runs_is_not_lost_again(tmp_path: Path) -> None:
    path = tmp_path / "spending.jsonl"
    for _ in range(2):
        with Budget(ledger=Ledger(path, Usage(40, 400, 40))).reserve(Size(5, 0, 5)) as reservation:
            reservation.sent()
            reservation.settle()  # lost: nobody said what it was counted as
    assert Ledger(path).before == Usage(42, 410, 50)


def test_pictures_of_unknown_price_are_written_down_as_many_tokens_and_as_they_were_measured(tmp_path: Path) -> None:
    path = tmp_path / "spending.jsonl"
    with Budget(ledger=Ledger(path)).reserve(Size(100, 2, 10)) as reservation:
        reservation.sent()
        reservation.settle()
    assert Ledger(path).before == Usage(1, 100 + 2 * 2500, 10)
    question = asked(tmp_path / "p", prompts=1)[0]
    journal = Journal(tmp_path / "j")
    journal.append(entry_of("k", 0, question, Reply("", input_tokens=10_001)))
    assert Journal(tmp_path / "j").picture_tokens == 5001  # of two
    assert Budget(price=Price(1, 0, 300), picture_tokens=5001).worst(Size(0, 2, 0)) == Budget(price=Price(1, 0)).cost(
        10_002, 0
    )
