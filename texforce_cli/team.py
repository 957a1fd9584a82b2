"""The processes of a job: `--num-processes`, or those that `accelerate launch` or torchrun have begun.

What travels between them is small: gradients of the LoRA, rewards, and the leader's word on what comes next. Words go through
the store that every job of torch.distributed has, so that a process that ended, failed or hangs is named instead of waited for,
and waiting can be interrupted; gradients are summed by gloo or NCCL.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import platform
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from texforce_cli.errors import Interrupted, TexforceError, UsageError, first_line

if TYPE_CHECKING:
    from torch import Tensor

Shield = Callable[[], contextlib.AbstractContextManager[None]]


class Team:
    """A process by itself. The leader is rank 0."""

    rank, size = 0, 1
    shield: Shield = contextlib.nullcontext
    """What keeps signals from breaking off an exchange in its middle."""
    heed: Callable[[], None] = staticmethod(lambda: None)
    """Called again and again while the others are waited for; it may raise to go."""

    def total(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""

    def each(self, value: Any) -> list[Any]:
        """What every process gave, by rank."""
        return [value]

    def of_leader(self, value: Any = None) -> Any:
        """What the leader gave."""
        return value

    def device(self, name: str) -> str:
        """The device of this process where the job's is `name`."""
        return name

    def be_patient(self, seconds: float) -> None:
        """All have loaded what they need; from now on wait for the others at most `seconds`."""

    def leave(self, error: BaseException) -> None:
        """Tell the others why this process goes."""

    def close(self) -> None:
        """Nothing more will be exchanged."""


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, number) of this process under `accelerate launch` or torchrun; (0, 1) elsewhere."""
    try:
        rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1
    return (rank, size) if 0 <= rank < size else (0, 1)


def machine() -> str:
    """A name of this machine that its processes share."""
    return os.environ.get("GROUP_RANK") or platform.node()


_START = 1800.0
"""Seconds that a process may take to start: it may have to download a model."""
_PULSE, _PULSELESS = 2.0, 20.0
"""A process shows every so many seconds that it lives; after so many without, it does not."""
_SLICE = timedelta(seconds=0.25)
"""So long at most does waiting keep a signal from being heard."""
_LAST_WORDS = 5.0
"""Seconds that a process has to end by itself when the job is over."""


class Store(Protocol):
    """Words by their keys, as the stores of torch.distributed keep them; RuntimeError where there are none."""

    def set(self, key: str, value: bytes) -> object: ...

    def get(self, key: str) -> bytes: ...

    def check(self, keys: list[str]) -> bool: ...

    def wait(self, keys: list[str], timeout: timedelta) -> object: ...

    def delete_key(self, key: str) -> bool: ...


class Folder:
    """A store for the processes of one machine: a file for each key, in a folder that only this user can read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def set(self, key: str, value: bytes) -> None:
        """Whole or not at all."""
        place = self._place(key)
        new = place.with_suffix(f".{threading.get_ident()}.new")
        try:
            new.write_bytes(value)
            new.replace(place)
        except OSError as error:
            if os.path.lexists(self.path):  # no process has gone: the disk is full
                raise TexforceError(
                    f"'{place}' cannot be written ({error.strerror})",
                    "make room there, or name another folder with TMPDIR, then go on with --resume",
                ) from error
            raise RuntimeError(f"'{place}' cannot be written: {error.strerror}") from error

    def get(self, key: str) -> bytes:
        """What stands there."""
        try:
            return self._place(key).read_bytes()
        except OSError as error:
            raise RuntimeError(f"nothing is known of {key}") from error

    def check(self, keys: list[str]) -> bool:
        """Whether all are there."""
        return all(self._place(key).exists() for key in keys)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Until all are there."""
        pause, deadline = 1e-4, time.monotonic() + timeout.total_seconds()
        while not self.check(keys):
            if time.monotonic() > deadline:
                raise RuntimeError(f"waited for {', '.join(keys)}")
            time.sleep(pause)
            pause = min(0.01, 2 * pause)

    def delete_key(self, key: str) -> bool:
        """Forget it."""
        self._place(key).unlink(missing_ok=True)
        return True

    def _place(self, key: str) -> Path:
        return self.path / key.replace("/", "-")


class Processes(Team):
    """One of several processes."""

    def __init__(
        self, words: Store, sums: Callable[[], Any], rank: int, size: int, ended: Callable[[], list[int]] = list
    ) -> None:
        """`words`: where they meet; `sums`: makes the store by which torch.distributed begins, when `compute` is called.
        `ended`: the ranks that are known to have ended.
        """
        self.rank, self.size = rank, size
        self.told = False
        """Whether this process has learnt from another one that the job is over."""
        self._store, self._sums = words, sums
        self._ended = ended
        self._patience = _START
        self._turn = 0
        self._stopped = threading.Event()
        self._pulse = threading.Thread(target=self._show_life, name="texforce-pulse", daemon=True)
        self._pulse.start()

    def compute(self, device: str, seconds: float) -> None:
        """Be ready to sum on `device`; a sum takes at most `seconds`."""
        import torch
        import torch.distributed as dist

        cuda = device.startswith("cuda")
        if cuda:
            torch.cuda.set_device(self.device(device))
            # a sum that fails is an error here, as of gloo; else NCCL's watchdog ends the process without a sentence
            os.environ.setdefault("TORCH_NCCL_BLOCKING_WAIT", "1")
        # when all have answered, what follows waits for nobody
        gpus = self.each(_uuid(self.device(device)) if cuda else self.rank)
        if len(set(gpus)) < len(gpus):
            raise UsageError(f"{len(gpus)} processes share {len(set(gpus))} GPUs", "give fewer processes")
        try:
            dist.init_process_group(
                "nccl" if cuda else "gloo",
                store=self._sums(),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=max(60.0, seconds)),
            )
            dist.all_reduce(torch.zeros(1, device="cuda" if cuda else "cpu"))  # NCCL takes its memory at the first sum
        except (RuntimeError, ValueError) as error:
            raise TexforceError(
                f"process {self.rank} cannot exchange gradients with the others ({first_line(error)})",
                "see the network: GLOO_SOCKET_IFNAME or NCCL_SOCKET_IFNAME names the interface to use",
            ) from error

    def device(self, name: str) -> str:
        import torch

        if not name.startswith("cuda"):
            return name
        seen = torch.cuda.device_count()
        own = 0 if seen == 1 else os.environ.get("LOCAL_RANK", "0")  # a scheduler may show each its own alone
        return f"cuda:{own}"

    def be_patient(self, seconds: float) -> None:
        self.each(None)
        self._patience = seconds

    def total(self, tensors: Sequence[Tensor]) -> None:
        import torch
        import torch.distributed as dist

        flat = torch.cat([tensor.flatten() for tensor in tensors])
        self.each(None)
        with self.shield():  # the others count on this process from here on
            self.each(None)
            try:
                dist.all_reduce(flat)
            except RuntimeError as error:
                raise self._broken(error) from error
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(summed.view_as(tensor))

    def each(self, value: Any) -> list[Any]:
        self._turn += 1
        try:
            self._set(f"{self._turn}/{self.rank}", value)
        except RuntimeError as error:
            raise self._gone(error) from error
        values = [value if rank == self.rank else self._heard(rank) for rank in range(self.size)]
        if self._turn > 1:  # all have come here, so all have heard what was said before
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(f"{self._turn - 1}/{self.rank}")
        return values

    def of_leader(self, value: Any = None) -> Any:
        return self.each(value if self.rank == 0 else None)[0]

    def leave(self, error: BaseException) -> None:
        if not self.told:
            with contextlib.suppress(RuntimeError, TexforceError):
                self._set(f"left/{self.rank}", _told(error))

    def part(self) -> None:
        """The job is done. The leader goes last, for it may hold the store."""
        with contextlib.suppress(RuntimeError, TexforceError):
            if self.rank:
                self._set(f"done/{self.rank}", None)
                return
            self._store.wait([f"done/{rank}" for rank in range(1, self.size)], timedelta(seconds=_LAST_WORDS))

    def close(self) -> None:
        import torch.distributed as dist

        self._stopped.set()
        self._pulse.join()
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    def _set(self, key: str, value: Any) -> None:
        self._store.set(key, pickle.dumps(value))

    def _get(self, key: str) -> Any:
        return pickle.loads(self._store.get(key))

    def _heard(self, rank: int) -> Any:
        """What process `rank` says at this turn.

        Raises:
            TexforceError, Interrupted: one of the others left and said why, ended, or lets this one wait too long.
        """
        key, begun = f"{self._turn}/{rank}", time.monotonic()
        pulse, alive = "", begun
        while True:
            try:
                self._store.wait([key], _SLICE)
                return self._get(key)
            except RuntimeError as error:  # torch's DistStoreError: not yet; or the store is gone
                self.heed()
                now = time.monotonic()
                try:
                    self._see_who_left()
                    shown = self._shown(rank)
                except RuntimeError:
                    raise self._gone(error) from error
                pulse, alive = (shown, now) if shown != pulse else (pulse, alive)
                if ended := self._ended():
                    raise self._lost(ended) from None
                if shown and now - alive > _PULSELESS:
                    raise self._lost([rank], f"no sign of life for {_PULSELESS:g} s") from None
                if now - begun > self._patience:
                    raise self._lost([rank], f"did not answer within {self._patience:g} s") from None

    def _see_who_left(self) -> None:
        for rank in range(self.size):
            if rank != self.rank and self._store.check([f"left/{rank}"]):
                message, hint, exit_code = self._get(f"left/{rank}")
                self.told = True
                if exit_code:
                    raise Interrupted(message, hint, exit_code=exit_code)
                raise TexforceError(message if rank == 0 else f"process {rank}: {message}", hint)

    def _shown(self, rank: int) -> str:
        """The last sign of life of process `rank`; "" before the first."""
        key = f"pulse/{rank}"
        return str(self._get(key)) if self._store.check([key]) else ""

    def _broken(self, error: RuntimeError) -> TexforceError:
        """Who broke a sum: what one of the others says of it goes before what is seen from here."""
        with contextlib.suppress(RuntimeError):
            self._see_who_left()
        ranks = self._ended() or self._silent()
        with contextlib.suppress(RuntimeError):
            self._see_who_left()
        return self._lost(self._ended() or ranks, first_line(error))

    def _silent(self) -> list[int]:
        """The others that show no life while three pulses go by: a broken sum does not say whose fault it was."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            before = [self._shown(rank) for rank in others]
            time.sleep(3 * _PULSE)
            return [rank for rank, shown in zip(others, before) if self._shown(rank) == shown]
        except RuntimeError:  # the leader held the store
            return [0] if self.rank else []

    def _lost(self, ranks: Sequence[int], how: str = "") -> TexforceError:
        which = f"process {', '.join(map(str, ranks))} of {self.size}" if ranks else "another process"
        return TexforceError(
            f"{which} ended or hangs" + (f" ({how})" if how else ""),
            "see its messages; the epochs before this one are saved, go on with --resume",
        )

    def _gone(self, error: RuntimeError) -> TexforceError:
        """The store does not answer: the leader holds it."""
        return self._lost([0] if self.rank else [], first_line(error))

    def _show_life(self) -> None:
        count = 0
        while True:
            count += 1
            with contextlib.suppress(RuntimeError, TexforceError):  # the disk may be full for a moment only
                self._set(f"pulse/{self.rank}", str(count))
            if self._stopped.wait(_PULSE):
                return


def _told(error: BaseException) -> tuple[str, str | None, int]:
    """An error as the others are told it: message, hint, exit code where it is a request to stop (else 0)."""
    if isinstance(error, Interrupted):
        return error.message, error.hint, error.exit_code
    if isinstance(error, TexforceError):
        return error.message, error.hint, 0
    if isinstance(error, KeyboardInterrupt):
        return "stopped", None, 130
    return f"{type(error).__name__}: {error}", None, 0


def _uuid(device: str) -> str:
    """What tells a GPU from all others, of other machines too."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)


def joined() -> Processes:
    """This process among those of a launcher."""
    import torch.distributed as dist

    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(seconds=_START)))
    except (RuntimeError, ValueError) as error:
        raise TexforceError(
            f"the processes of this job did not find each other ({first_line(error)})",
            "see the messages of the others",
        ) from error
    return Processes(dist.PrefixStore("words", store), lambda: dist.PrefixStore("sums", store), rank, size)


@contextlib.contextmanager
def team(count: int, device: str, follow: Callable[[Processes], Any]) -> Iterator[Team]:
    """The team that this process leads: of a launcher's processes, else of `count` of our own, this one among them.

    Each of the others calls `follow` with its place in the team.

    Raises:
        UsageError: a count that is not the launcher's, a device that cannot be shared, more processes than GPUs.
    """
    _, size = launched()
    if size > 1 and count not in (1, size):
        raise UsageError(f"--num-processes {count} contradicts the launcher's {size}", "leave it out")
    if count == size == 1:
        yield Team()
        return
    _refuse_device(device, int(os.environ.get("LOCAL_WORLD_SIZE", size)) if size > 1 else count, each_its_own=size > 1)
    if size > 1:
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
                    with _environment(LOCAL_RANK=rank):
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
    """A process of our own. The leader has been told what went wrong, or is gone: no word of it here."""
    parent = os.getppid()
    with contextlib.closing(_place(private, rank, size, lambda: [0] if os.getppid() != parent else [])) as place:
        try:
            follow(place)
        except TexforceError:
            sys.exit(1)


def _broken(others: Sequence[multiprocessing.process.BaseProcess]) -> list[int]:
    """The ranks of those that were killed, else of those that failed without a word."""
    codes = {rank: process.exitcode or 0 for rank, process in enumerate(others, 1)}
    return [rank for rank, code in codes.items() if code < 0] or [rank for rank, code in codes.items() if code]


def _end(others: Sequence[multiprocessing.process.BaseProcess]) -> None:
    deadline = time.monotonic() + _LAST_WORDS
    for process in others:
        if process.pid:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()


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
