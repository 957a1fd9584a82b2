"""How the processes of a job come together: a launcher's, or our own, which are started and ended here."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from texforce_cli.errors import TexforceError, UsageError, first_line
from texforce_cli.team import Team, launched, sharing
from texforce_cli.team.processes import LAST_WORDS, PULSE, START, Lost, Processes
from texforce_cli.team.store import Folder, Pieces

_LEADER_HEARS = 30.0
"""Seconds that the leader has to hear that the others are gone, which it does after each batch; then it hangs."""

_STORE_ANSWERS = 60.0
"""Seconds that a launcher's store, on another machine perhaps, has to answer."""


def joined() -> Processes:
    """This process among those of a launcher."""
    import torch.distributed as dist

    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=START)))
    except (RuntimeError, ValueError) as error:
        raise TexforceError(
            f"the processes of this job did not find each other ({first_line(error)})",
            "see the messages of the others",
        ) from error
    words = Pieces(dist.PrefixStore("words", store))
    place = Processes(words, lambda: dist.PrefixStore("sums", store), rank, size)
    threading.Thread(target=_guard, args=(place,), name="texforce-guard", daemon=True).start()
    return place


def _guard(place: Processes) -> None:
    """End this process where the store falls silent: who calls one whose machine is frozen or off waits without end."""
    silent = seen = 0
    while not place.stopped.wait(PULSE):  # a process that was stopped itself is not silent for as many turns
        silent, seen = (silent + 1 if place.answered == seen else 0), place.answered
        if silent * PULSE > _STORE_ANSWERS:
            why = f"the machine where they meet has not answered for {_STORE_ANSWERS:g} s"
            sys.stderr.write(f"error: {Lost([], place.size, why)}\n")
            sys.stderr.flush()
            os._exit(1)  # the thread that would have to end it waits


@contextlib.contextmanager
def team(count: int, device: str, follow: Callable[[Processes], Any]) -> Iterator[Team]:
    """The team that this process leads: of a launcher's processes, else of `count` of our own, this one among them.

    Each of the others calls `follow` with its place in the team.

    Raises:
        UsageError: a count that is not the launcher's, a device that cannot be shared, more processes than GPUs.
    """
    size, here = sharing(count)
    launcher = launched()[1] > 1
    if launcher and count not in (1, size):
        raise UsageError(f"--num-processes {count} contradicts the launcher's {size}", "leave it out")
    if size == 1:
        yield Team()
        return
    _refuse_device(device, here, each_its_own=launcher)
    if launcher:
        with contextlib.closing(joined()) as place:
            yield place
            place.part()
    else:
        with _own(count, device, follow) as place:
            yield place


def _refuse_device(device: str, here: int, *, each_its_own: bool) -> None:
    """`each_its_own`: a scheduler may show every process a GPU of its own and no other; `compute` finds out."""
    import torch

    if device not in ("cuda", "cuda:0", "cpu"):
        raise UsageError(f"several processes cannot share '{device}'", "give --device cuda or cpu")
    seen = torch.cuda.device_count() if device != "cpu" else here
    if here > seen and not (each_its_own and seen == 1):
        raise UsageError(f"{here} processes are more than the {seen} GPUs of this machine", "give fewer")


@contextlib.contextmanager
def _own(count: int, device: str, follow: Callable[[Processes], Any]) -> Iterator[Team]:
    """`count` - 1 processes beside this one, which is their leader; they end with the block.

    They meet in a folder that only this user can read, not at a port.
    """
    import torch

    threads = torch.get_num_threads()
    share = max(1, threads // count)
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="texforce-") as private:
        others = [
            context.Process(target=_member, args=(follow, private, rank, count), daemon=True)
            for rank in range(1, count)
        ]
        try:
            with _environment(OMP_NUM_THREADS=share, GLOO_SOCKET_IFNAME=_loopback()):
                for rank, process in enumerate(others, 1):
                    with _deaf(), _environment(LOCAL_RANK=rank):
                        process.start()
                if device == "cpu":
                    torch.set_num_threads(share)
                with contextlib.closing(_place(private, 0, count, lambda: _broken(others))) as place:
                    yield place
        finally:
            torch.set_num_threads(threads)
            _end(others)


def _loopback() -> str:
    """What this system calls the interface that leads nowhere else: lo, lo0, Loopback Pseudo-Interface 1."""
    import psutil

    found: dict[str, Any] = psutil.net_if_addrs()
    return next((name for name in found if any(one.address == "127.0.0.1" for one in found[name])), "lo")


def _place(private: str, rank: int, size: int, ended: Callable[[], list[int]]) -> Processes:
    import torch.distributed as dist

    folder = Path(private)
    return Processes(Folder(folder), lambda: dist.FileStore(str(folder / "sums"), size), rank, size, ended)


def _member(follow: Callable[[Processes], Any], private: str, rank: int, size: int) -> None:
    """A process of our own. The leader has been told what went wrong, or is gone: no word of it here. One that hangs is ended."""
    leader = os.getppid()
    try:
        with contextlib.closing(_place(private, rank, size, lambda: [0] if os.getppid() != leader else [])) as place:
            try:
                follow(place)
            except TexforceError as error:
                if isinstance(error, Lost) and 0 in error.ranks and _ended_leader(place, leader):
                    sys.exit(f"error: {error}")
                sys.exit(1)
            except KeyboardInterrupt:  # the leader has heard it too
                sys.exit(130)
    finally:
        if os.getppid() != leader:  # which would have removed it
            shutil.rmtree(private, ignore_errors=True)


def _ended_leader(place: Processes, leader: int) -> bool:
    """Whether the leader had to be ended, which has been told that the others go and does not hear it."""
    import psutil

    deadline = time.monotonic() + _LEADER_HEARS
    while os.getppid() == leader and not place.knows(0):
        if time.monotonic() > deadline:
            with contextlib.suppress(psutil.NoSuchProcess):
                psutil.Process(leader).kill()
            return True
        time.sleep(0.05)
    return False


def _broken(others: Sequence[multiprocessing.process.BaseProcess]) -> list[int]:
    """The ranks of those that were killed, else of those that failed without a word."""
    codes = {rank: process.exitcode or 0 for rank, process in enumerate(others, 1)}
    return [rank for rank, code in codes.items() if code < 0] or [rank for rank, code in codes.items() if code]


def _end(others: Sequence[multiprocessing.process.BaseProcess]) -> None:
    deadline = time.monotonic() + LAST_WORDS
    for process in others:
        if process.pid:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


@contextlib.contextmanager
def _deaf() -> Iterator[None]:
    """Processes that begin within this block hear no Ctrl-C before they listen for it: until then it is the leader's to tell them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _environment(**values: Any) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update({name: str(value) for name, value in values.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
