"""The processes of a job: `--num-processes`, or those that `accelerate launch` or torchrun have begun.

What travels between them is small: gradients of the LoRA, rewards, and the leader's word on what comes next. Before each
exchange they meet, so that a process that ended, failed or hangs is named instead of waited for.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import os
import re
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from texforce_cli.errors import Interrupted, TexforceError, UsageError

if TYPE_CHECKING:
    from torch import Tensor


class Team:
    """A process by itself. The leader is rank 0."""

    rank, size = 0, 1

    def total(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes."""

    def each(self, value: Any) -> list[Any]:
        """What every process gave, by rank."""
        return [value]

    def of_leader(self, value: Any = None) -> Any:
        """What the leader gave."""
        return value

    def leave(self, error: BaseException) -> None:
        """Tell the others at the next meeting why this process goes."""

    def close(self) -> None:
        """Nothing more will be exchanged."""


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, number) of this process under `accelerate launch` or torchrun; (0, 1) elsewhere."""
    try:
        rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1
    return (rank, size) if 0 <= rank < size else (0, 1)


class Processes(Team):
    """The processes of torch.distributed, as Accelerate sets it up from the launcher's environment."""

    def __init__(self, device: str, seconds: float, ended: Callable[[], list[int]] = list) -> None:
        """Meet the other processes, and wait for them at most `seconds` at every exchange. `ended` tells the
        ranks of those that have ended without having been told to, where this process can know.

        Raises:
            TexforceError: they are not there.
        """
        import torch.distributed as dist
        from accelerate import PartialState

        self._timeout, self._ended = timedelta(seconds=seconds), ended
        on_cpu = not device.startswith("cuda")
        try:
            state = PartialState(cpu=on_cpu, timeout=_START, **({"backend": "gloo"} if on_cpu else {}))
        except (RuntimeError, ValueError) as error:  # also torch's DistError
            raise TexforceError(
                f"the processes of this job did not find each other within {_START.seconds} s",
                "see the others' messages",
            ) from error
        self.rank, self.size = state.process_index, state.num_processes
        # objects and meetings go through the CPU whatever the gradients go through
        self._words = dist.group.WORLD if on_cpu else dist.new_group(backend="gloo", timeout=_START)
        self._gone = False
        self.told = False
        """Whether this process has learnt from another one that the job is over."""

    def total(self, tensors: Sequence[Tensor]) -> None:
        import torch
        import torch.distributed as dist

        self._meet()
        flat = torch.cat([tensor.flatten() for tensor in tensors])
        with self._named():
            dist.all_reduce(flat)
        for tensor, summed in zip(tensors, flat.split([tensor.numel() for tensor in tensors])):
            tensor.copy_(summed.view_as(tensor))

    def each(self, value: Any) -> list[Any]:
        self._meet()
        return self._gathered(value)

    def of_leader(self, value: Any = None) -> Any:
        import torch.distributed as dist

        self._meet()
        box = [value]
        with self._named():
            dist.broadcast_object_list(box, src=0, group=self._words)
        return box[0]

    def leave(self, error: BaseException) -> None:
        if not self._gone:
            with contextlib.suppress(TexforceError):
                self._meet(error)

    def close(self) -> None:
        from accelerate import PartialState

        with contextlib.suppress(Exception):
            PartialState().destroy_process_group(None)
        PartialState._reset_state()

    def _meet(self, error: BaseException | None = None) -> None:
        """Wait for all; raise what one of them brought."""
        import torch.distributed as dist

        with self._named():
            dist.monitored_barrier(self._words, self._timeout, wait_all_ranks=True)
        for rank, problem in enumerate(self._gathered(error and _told(error))):
            if problem and rank != self.rank:
                self._gone = self.told = True
                message, hint, exit_code = problem
                if exit_code:
                    raise Interrupted(message, hint, exit_code=exit_code)
                raise TexforceError(message if rank == 0 else f"process {rank}: {message}", hint)

    def _gathered(self, value: Any) -> list[Any]:
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        with self._named():
            dist.all_gather_object(values, value, group=self._words)
        return values

    @contextlib.contextmanager
    def _named(self) -> Iterator[None]:
        """Name the processes that did not answer."""
        try:
            yield
        except RuntimeError as error:
            self._gone = True
            missing = re.search(r"[Rr]anks? ([\d, ]+) failed to pass", str(error))
            ranks = missing[1] if missing else ", ".join(map(str, self._ended()))
            which = (
                f"process {ranks} of {self.size}" if ranks else "another process" if self.rank == 0 else "the first one"
            )
            raise TexforceError(
                f"{which} ended, or did not answer within {self._timeout.total_seconds():g} s",
                "see its messages; the epochs before this one are saved, go on with --resume",
            ) from error


_START = timedelta(seconds=300)
"""How long a process may take to start."""


def _told(error: BaseException) -> tuple[str, str | None, int]:
    """An error as the others are told it: message, hint, exit code where it is a request to stop (else 0)."""
    if isinstance(error, Interrupted):
        return error.message, error.hint, error.exit_code
    if isinstance(error, TexforceError):
        return error.message, error.hint, 0
    if isinstance(error, KeyboardInterrupt):
        return "stopped", None, 130
    return f"{type(error).__name__}: {error}", None, 0


@contextlib.contextmanager
def team(count: int, device: str, seconds: float, follow: Callable[[str, float], Any]) -> Iterator[Team]:
    """The team that this process leads: of a launcher's processes, else of `count` of our own, this one among them.

    Each of the others calls `follow(device, seconds)`, with `seconds` the longest that any is waited for.

    Raises:
        UsageError: a count that is not the launcher's, more processes than GPUs.
    """
    _, size = launched()
    if size > 1 and count not in (1, size):
        raise UsageError(f"--num-processes {count} contradicts the launcher's {size}", "leave it out")
    if size > 1:
        with contextlib.closing(Processes(device, seconds)) as joined:
            yield joined
    elif count == 1:
        yield Team()
    else:
        with _own(count, device, seconds, follow) as joined:
            yield joined


@contextlib.contextmanager
def _own(count: int, device: str, seconds: float, follow: Callable[[str, float], Any]) -> Iterator[Team]:
    """`count` - 1 processes beside this one, which is their leader; they end with the block."""
    import torch

    if device not in ("cuda", "cpu"):
        raise UsageError(f"--num-processes {count} on '{device}'", "several processes need --device cuda or cpu")
    if device == "cuda" and count > torch.cuda.device_count():
        raise UsageError(
            f"--num-processes {count} is more than the {torch.cuda.device_count()} GPUs of this machine", "give fewer"
        )
    threads = torch.get_num_threads()
    share = max(1, threads // count)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "WORLD_SIZE": count,
        "LOCAL_WORLD_SIZE": count,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "OMP_NUM_THREADS": share,
        "GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo",
    }
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_member, args=(follow, device, seconds), daemon=True) for _ in range(1, count)]
    try:
        for rank, process in enumerate(others, 1):
            with _environment(shared, RANK=rank, LOCAL_RANK=rank):
                process.start()
        if device == "cpu":
            torch.set_num_threads(share)
        with _environment(shared, RANK=0, LOCAL_RANK=0):
            joined = Processes(device, seconds, lambda: _broken(others))
        with contextlib.closing(joined):
            yield joined
    finally:
        torch.set_num_threads(threads)
        for process in others:
            process.join(_LAST_WORDS if process.pid else 0)
            if process.is_alive():
                process.kill()
                process.join()


def _broken(others: Sequence[multiprocessing.process.BaseProcess]) -> list[int]:
    """The ranks of those that were killed, else of those that failed; a second is given to learn of it."""
    multiprocessing.connection.wait([process.sentinel for process in others], timeout=1)
    codes = {rank: process.exitcode or 0 for rank, process in enumerate(others, 1)}
    return [rank for rank, code in codes.items() if code < 0] or [rank for rank, code in codes.items() if code]


def _member(follow: Callable[[str, float], Any], device: str, seconds: float) -> None:
    try:
        follow(device, seconds)
    except TexforceError:
        sys.exit(1)  # the leader has been told, or is gone


_LAST_WORDS = 5.0
"""Seconds that a process of our own has to end by itself when the job is over."""


@contextlib.contextmanager
def _environment(shared: Mapping[str, Any], **own: Any) -> Iterator[None]:
    names = {**shared, **own}
    before = {name: os.environ.get(name) for name in names}
    os.environ.update({name: str(value) for name, value in names.items()})
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
