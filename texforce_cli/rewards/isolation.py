"""Rewards in processes of their own: started once, kept warm, timed, restarted, and asked again.

To the trainer an `IsolatedReward` is a reward like any other. What one picture does to a worker costs that picture, not the
run: the batch is asked again, then halved until the picture is found; it has no score and is named.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import signal
import subprocess
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from texforce_cli.errors import TexforceError
from texforce_cli.rewards import worker
from texforce_cli.rewards.places import Place
from texforce_cli.rewards.worker import FrameError, read_frame, write_frame

_BACK_OFF = (0.0, 0.5, 2.0)
"""Seconds before the first, second, third start in a row; then no more."""
_LARGEST_NOISE = 2**16
"""So many bytes before the first frame are passed over: a login shell on another machine may greet."""
_REMEMBERED_LINES = 30
_DYING = 5.0
"""Seconds until a process that was killed is no longer waited for."""


@dataclass(frozen=True)
class WorkerSettings:
    """How workers are run."""

    timeout: float = 120.0
    start_timeout: float = 900.0
    workers: int = 1
    memory_gb: float | None = None
    failures: float = 3
    """So many pictures that fail alone, in one batch or in a row, end it: then it is the reward that is at fault, not they."""
    substitute: bool = True
    """Whether what cannot be scored gets the worst score of the others, as training needs it (`RewardSet.filled`), and a reward
    may not answer NaN; else a picture of which it does has no score either."""

    @property
    def patience(self) -> float:
        """Seconds that another process waits for a score, while workers are started anew and batches asked again: three bad
        pictures among 64 are found after 19 questions without an answer."""
        return 3 * self.start_timeout + 24 * self.timeout


class WorkerFailure(Exception):
    """A worker that died, hung, or spoke nonsense: the process is gone."""


class RewardFailure(Exception):
    """The reward raised; the process lives."""


class WrongCount(Exception):
    """The reward does not return one value an image; the process lives."""


class Worker:
    """One process with one reward in it."""

    def __init__(self, place: Place, start: Mapping[str, Any], settings: WorkerSettings, device: str = "") -> None:
        """`device`: the one CUDA device that it sees, as CUDA_VISIBLE_DEVICES names it; by default all of them."""
        self.place, self.settings, self.device = place, settings, device
        self.memory = 0
        self.counts: Mapping[str, int] = {}
        self._start = start
        self._process: subprocess.Popen[bytes] | None = None
        self._said: deque[str] = deque(maxlen=_REMEMBERED_LINES)
        self._listener: threading.Thread | None = None
        self._asked: Future[dict[str, Any]] | None = None
        self.closed = False
        """Set by `close`, also from another thread: from then on no process is started."""

    @property
    def pid(self) -> int | None:
        """Of the process (of ssh, on another machine), while there is one."""
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        process = self._process
        return process is not None and process.poll() is None

    def ensure(self) -> None:
        """Start the process unless it runs.

        Raises:
            WorkerFailure, RewardFailure: it did not come up.
        """
        if self.alive:
            return
        self.kill()
        self._said.clear()
        self._process = _spawn(self.place, self.device)
        if self.closed:
            self.kill()
            raise WorkerFailure("was closed")
        self._listener = threading.Thread(target=self._remember, args=(self._process,), daemon=True)
        self._listener.start()
        if self._start:
            try:
                self.ask(
                    self._start, timeout=self.settings.start_timeout, noise=_LARGEST_NOISE if self.place.host else 0
                )
            except RewardFailure:
                self.kill()
                raise

    def ask(self, header: Mapping[str, Any], payload: Any = b"", *, timeout: float, noise: int = 0) -> dict[str, Any]:
        """Send a request and wait for its answer.

        Raises:
            WorkerFailure: no answer in `timeout` seconds, the process ended, or it answered nonsense; it is killed.
            RewardFailure, WrongCount: the reward raised, or returned another number of values.
        """
        self._asked = asked = _in_thread(_exchange, self._process, header, payload, noise)
        try:
            answer = asked.result(timeout)
        except TimeoutError:
            self.kill()
            raise WorkerFailure(f"did not answer within {timeout:g} seconds{self.last_words}") from None
        except (EOFError, OSError):
            raise WorkerFailure(self._how_it_ended()) from None
        except FrameError as error:
            self.kill()
            raise WorkerFailure(str(error)) from error
        memory = answer.get("memory")
        self.memory = max(self.memory, memory if isinstance(memory, int) else 0)
        if answer.get("type") == "error":
            message = str(answer.get("error"))[:2000]
            if answer.get("wrong_count"):
                raise WrongCount(message.partition(": ")[2])
            raise RewardFailure(message)
        return answer

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One batch.

        Raises:
            WorkerFailure, RewardFailure, WrongCount: as in `ask`.
        """
        header = {"type": "score", "shape": images.shape, "prompts": list(prompts), "metadata": list(metadata)}
        payload = np.ascontiguousarray(images).data.cast("B")
        answer = self.ask(header, payload, timeout=self.settings.timeout)
        scores = answer.get("scores")
        listed = scores if isinstance(scores, list) else []
        counts = answer.get("counts")
        counts = counts if isinstance(counts, dict) else {}
        self.counts = {what: number for what, number in counts.items() if type(number) is int}
        try:
            if len(listed) == len(prompts) and all(isinstance(value, (int, float)) for value in listed):
                return [float(value) for value in listed]
        except OverflowError:  # an integer of hundreds of digits
            pass
        self.kill()
        raise WorkerFailure("answered without one score an image")

    @property
    def last_words(self) -> str:
        """The last line it wrote to stderr, to be put behind a sentence."""
        if self._listener is not None:
            self._listener.join(0.5)  # what a dying process wrote is still on its way
        line = next((line for line in reversed(self._said) if line.strip()), "")
        return f"; it said last: {line.strip()[:300]}" if line else ""

    def close(self) -> None:
        """Let the reward end, then the process; one that is at work is ended at once."""
        self.closed = True
        try:
            if self.alive and (self._asked is None or self._asked.done()):
                with contextlib.suppress(WorkerFailure, RewardFailure, WrongCount):
                    self.ask({"type": "stop"}, timeout=5)
        finally:
            self.kill()

    def kill(self) -> None:
        """End the process now, and what it has started. A child that left its group may hold the pipes open: they are left
        to the thread that still reads them, and nobody waits."""
        process, self._process = self._process, None
        if process is None:
            return
        asked, self._asked = self._asked, None
        if hasattr(os, "killpg"):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # it leads a session of its own
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_DYING)
        if asked is None:
            _close_pipes(process)
        else:
            asked.add_done_callback(lambda _: _close_pipes(process))

    def _how_it_ended(self) -> str:
        process = self._process
        if process is None:
            return "was ended"
        try:
            code = process.wait(5)
        except subprocess.TimeoutExpired:
            code = None
        said = self.last_words
        self.kill()
        if code is None:
            return f"closed its output{said}"
        if code < 0:
            with contextlib.suppress(ValueError):
                return f"was killed by {signal.Signals(-code).name}{said}"
        return f"ended with exit code {code}{said}"

    def _remember(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stderr is not None
        with process.stderr as stream:
            for line in iter(lambda: stream.readline(4096), b""):
                self._said.append(line.decode("utf-8", "replace"))


def _in_thread(call: Callable[..., dict[str, Any]], *arguments: Any) -> Future[dict[str, Any]]:
    """`call` in a thread that nobody waits for, not even the end of the program."""
    future: Future[dict[str, Any]] = Future()

    def run() -> None:
        try:
            future.set_result(call(*arguments))
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="texforce-worker", daemon=True).start()
    return future


def _exchange(
    process: subprocess.Popen[bytes] | None, header: Mapping[str, Any], payload: Any, noise: int
) -> dict[str, Any]:
    if process is None or process.stdin is None or process.stdout is None:
        raise EOFError
    write_frame(process.stdin, header, payload)  # type: ignore[arg-type]
    return read_frame(process.stdout, noise=noise)[0]  # type: ignore[arg-type]


def _close_pipes(process: subprocess.Popen[bytes]) -> None:
    for stream in (process.stdin, process.stdout):
        with contextlib.suppress(OSError, ValueError):
            if stream:
                stream.close()


# A worker dies with the thread that started it (Linux), so they are all started by one that lives as long as the process.
_spawner = ThreadPoolExecutor(1, thread_name_prefix="texforce-spawner")


def _spawn(place: Place, device: str = "") -> subprocess.Popen[bytes]:
    def start() -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            place.command if place.host else [*place.command, str(os.getpid())],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "CUDA_VISIBLE_DEVICES": device} if device else None,
            # Ctrl-C is for the trainer, which ends its workers in good order
            start_new_session=True,
            creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # the same on Windows
        )

    try:
        return _spawner.submit(start).result()
    except OSError as error:
        what = "ssh" if place.host else place.python
        raise WorkerFailure(f"could not be started ({what}: {error.strerror})") from error


def visible_devices() -> list[str]:
    """The CUDA devices that this process sees, as CUDA_VISIBLE_DEVICES names them; none without CUDA."""
    import torch

    count = torch.cuda.device_count()
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = [str(index) for index in range(count)] if named is None else named.split(",")
    return [name.strip() for name in names[:count]]


def ask_once(place: Place, header: Mapping[str, Any]) -> dict[str, Any]:
    """The answer of a fresh worker to one request that needs no reward.

    Raises:
        WorkerFailure, RewardFailure: there is none.
    """
    asked = Worker(place, {}, WorkerSettings())
    try:
        asked.ensure()
        return asked.ask(header, timeout=300.0)
    finally:
        asked.close()


@dataclass
class _Batch:
    images: NDArray[np.uint8]
    prompts: Sequence[str]
    metadata: Sequence[Mapping[str, Any]]

    def __len__(self) -> int:
        return len(self.prompts)

    def part(self, start: int, stop: int) -> _Batch:
        return _Batch(self.images[start:stop], self.prompts[start:stop], self.metadata[start:stop])


@dataclass
class _Verdict:
    """Scores in order, None for pictures that have none; and why they have none."""

    scores: list[float | None] = field(default_factory=list)
    poisoned: list[str] = field(default_factory=list)

    def __add__(self, other: _Verdict) -> _Verdict:
        return _Verdict(self.scores + other.scores, self.poisoned + other.poisoned)


def _measured(scores: Sequence[float], prompts: Sequence[str]) -> _Verdict:
    """Where a reward may answer NaN, that is no score."""
    unscored = [f"returned nan for the prompt '{p[:80]}'" for score, p in zip(scores, prompts) if np.isnan(score)]
    return _Verdict([None if np.isnan(score) else score for score in scores], unscored)


class IsolatedReward:
    """A reward whose score comes from worker processes."""

    input = "uint8"

    def __init__(
        self,
        name: str,
        factory: str,
        options: Mapping[str, str],
        places: Sequence[Place],
        settings: WorkerSettings,
        *,
        on_close: Callable[[], None] = lambda: None,
    ) -> None:
        self.name, self.settings, self._on_close = name, settings, on_close
        self._failed_in_a_row = 0
        self._turn = threading.Lock()
        self._warnings: queue.SimpleQueue[str] = queue.SimpleQueue()
        start: dict[str, Any] = {
            "type": "start",
            "protocol": worker.PROTOCOL,
            "factory": factory,
            "options": dict(options),
        }
        if settings.memory_gb:
            start["memory_limit"] = int(settings.memory_gb * 1e9)
        devices = visible_devices() if settings.workers > 1 and not all(place.host for place in places) else []
        self._workers = [
            Worker(place, start, settings, devices[i % len(devices)] if len(devices) > 1 and not place.host else "")
            for place in places
            for i in range(settings.workers)
        ]
        self._pool = ThreadPoolExecutor(len(self._workers), thread_name_prefix=f"texforce-{name}")
        self._earlier: Counter[str] = Counter()
        try:
            for started in [self._pool.submit(self._start, one) for one in self._workers]:
                started.result()
        except BaseException:
            self.close()
            raise

    @property
    def memory(self) -> int:
        """Bytes that all workers together have had at most, as far as they said."""
        return sum(one.memory for one in self._workers)

    @property
    def pids(self) -> list[int]:
        """The processes that run now."""
        return [pid for one in self._workers if (pid := one.pid)]

    @property
    def counts(self) -> dict[str, int]:
        """What the reward counts, over all workers and their restarts."""
        return dict(sum((Counter(one.counts) for one in self._workers), self._earlier))

    def warnings(self) -> list[str]:
        """What has happened since the last call and cost no more than a sentence."""
        found = []
        while not self._warnings.empty():
            found.append(self._warnings.get())
        return found

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        """One score an image [N], the batch split over the workers; of several threads one after the other. None for a picture
        that fails.

        Raises:
            TexforceError: no worker can be kept alive, or too many pictures fail.
        """
        with self._turn:
            return self._score(_Batch(images, prompts, metadata))

    def _score(self, batch: _Batch) -> list[float | None]:
        bounds = np.linspace(0, len(batch), min(len(self._workers), len(batch)) + 1).round().astype(int).tolist()
        parts = [batch.part(start, stop) for start, stop in itertools.pairwise(bounds)]
        futures: list[Future[_Verdict]] = [
            self._pool.submit(self._judge, one, part) for one, part in zip(self._workers, parts)
        ]
        verdict = sum((future.result() for future in futures), _Verdict())
        scored = any(value is not None for value in verdict.scores)
        self._failed_in_a_row = len(verdict.poisoned) + (0 if scored else self._failed_in_a_row)
        if self._failed_in_a_row >= self.settings.failures:
            raise self._too_many(verdict)
        given = "gets the worst score of the others" if self.settings.substitute else "has no score"
        for sentence in verdict.poisoned:
            self._warnings.put(f"reward '{self.name}' {sentence}; it {given}")
        return verdict.scores

    def close(self) -> None:
        """End all workers."""
        for one in self._workers:
            one.closed = True
        try:
            for one in self._workers:
                one.close()
        finally:
            for one in self._workers:
                one.kill()
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._on_close()

    def _judge(self, one: Worker, batch: _Batch, tries: int = 2) -> _Verdict:
        """Ask; ask again where the process failed; then halve, to find which picture it is."""
        reason = ""
        if len(batch) > 1 and batch.images.nbytes > worker.LARGEST_PAYLOAD:
            middle = len(batch) // 2
            return self._judge(one, batch.part(0, middle)) + self._judge(one, batch.part(middle, len(batch)))
        if not one.alive:
            self._warnings.put(f"reward '{self.name}': its process had ended between two batches; started again")
            self._start(one)
        for _ in range(tries):
            try:
                scores = one.score(batch.images, batch.prompts, batch.metadata)
                return _Verdict([*scores]) if self.settings.substitute else _measured(scores, batch.prompts)
            except WrongCount as error:
                raise TexforceError(
                    f"reward '{self.name}' {error}", "it breaks the contract; see its author"
                ) from error
            except RewardFailure as error:
                reason = f"raised {error}"
                break  # the same picture raises again
            except WorkerFailure as error:
                if one.closed:
                    raise TexforceError(f"reward '{self.name}' was closed") from error
                reason = str(error)
                self._warnings.put(f"reward '{self.name}': its process {reason}; started again")
                self._start(one)
        if len(batch) == 1:
            return _Verdict([None], [f"failed on a picture of the prompt '{batch.prompts[0][:80]}' ({reason})"])
        middle = len(batch) // 2
        verdict = self._judge(one, batch.part(0, middle), tries=1)
        if len(verdict.poisoned) < self.settings.failures:
            verdict += self._judge(one, batch.part(middle, len(batch)), tries=1)
        if len(verdict.poisoned) >= self.settings.failures:
            raise self._too_many(verdict)
        return verdict

    def _too_many(self, verdict: _Verdict) -> TexforceError:
        more = ", and on more" if len(verdict.poisoned) > 1 or self._failed_in_a_row > 1 else ""
        return TexforceError(
            f"reward '{self.name}' {verdict.poisoned[0]}{more}", f"try it alone: texforce rewards check {self.name}"
        )

    def _start(self, one: Worker) -> None:
        """Bring a worker up, waiting longer before each new try; what it had counted is kept."""
        self._earlier += Counter(one.counts)
        one.counts = {}
        reason = ""
        for seconds in _BACK_OFF:
            time.sleep(seconds)
            if one.closed:
                raise TexforceError(f"reward '{self.name}' was closed")
            try:
                one.ensure()
                return
            except RewardFailure as error:
                raise TexforceError(
                    f"reward '{self.name}' could not start: {error}",
                    f"see its options: texforce rewards info {self.name}",
                ) from error
            except WorkerFailure as error:
                reason = str(error)
        where = f" on {one.place.host}" if one.place.host else ""
        raise TexforceError(
            f"the process of reward '{self.name}'{where} {reason}, {len(_BACK_OFF)} times in a row",
            f"try it alone: texforce rewards check {self.name}",
        )
