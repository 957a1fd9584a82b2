"""One of several processes: what it says to the others, what it hears of them, and how it learns that one of them is gone."""

from __future__ import annotations

import contextlib
import os
import pickle
import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from texforce_cli.errors import Interrupted, Terminated, TexforceError, UsageError, first_line
from texforce_cli.team import Team
from texforce_cli.team.store import Store

if TYPE_CHECKING:
    from torch import Tensor

START = 1800.0
"""Seconds that a process may take to start: it may have to download a model."""
PULSE, _PULSELESS = 2.0, 20.0
"""A process shows every so many seconds that it lives; after so many without, it does not."""
_SLICE = timedelta(seconds=0.25)
"""So long at most does waiting keep a signal from being heard."""
LAST_WORDS = 5.0
"""Seconds that a process has to end by itself when the job is over."""


class Lost(TexforceError):
    """Some of the processes, `ranks`, ended or hang."""

    def __init__(self, ranks: Sequence[int], size: int, how: str = "") -> None:
        self.ranks = list(ranks)
        which = f"process {', '.join(map(str, ranks))} of {size}" if ranks else "another process"
        super().__init__(
            f"{which} ended or hangs" + (f" ({how})" if how else ""),
            "see its messages; the epochs before this one are saved, go on with --resume",
        )


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
        self._patience = START
        self._turn, self._steps = 0, 0
        self._nccl = False
        """Whether NCCL sums, on the GPUs; gloo sums on the CPU."""
        self._over = False
        """Whether the leader has left."""
        self._pulses: dict[int, str] = {}
        self._felt = -_PULSELESS
        self.answered = 0
        """How often the store has answered to a sign of life, if only by an error."""
        self.stopped = threading.Event()
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
        self._nccl = cuda and dist.is_nccl_available()  # torch for Windows has none
        try:
            dist.init_process_group(
                "nccl" if self._nccl else "gloo",
                store=self._sums(),
                rank=self.rank,
                world_size=self.size,
                timeout=timedelta(seconds=max(60.0, seconds)),
            )
            # NCCL takes its memory at the first sum
            dist.all_reduce(torch.zeros(1, device="cuda" if self._nccl else "cpu"))
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
        flat = flat if self._nccl else flat.cpu()
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
        values = self._heard([rank for rank in range(self.size) if rank != self.rank])
        values.insert(self.rank, value)
        if self._turn > 1:  # all have come here, so all have heard what was said before
            with contextlib.suppress(RuntimeError):
                self._store.delete_key(f"{self._turn - 1}/{self.rank}")
        return values

    def get_on(self) -> None:
        if self._over:  # the leader does not wait long
            self.look()
        self._steps += 1

    def look(self) -> None:
        try:
            self._see_who_left()
            silent = self._felt_no_pulse()
        except RuntimeError as error:
            raise self._gone(error) from error
        if ended := self._ended() or silent:
            raise self._lost(ended)

    def leave(self, error: BaseException) -> None:
        if not self.told:
            with contextlib.suppress(RuntimeError, TexforceError):
                self._set(f"left/{self.rank}", _told(error))

    def knows(self, rank: int) -> bool:
        """Whether process `rank` has learnt that the job is over, or says so itself."""
        try:
            return any(self._store.check([f"{word}/{rank}"]) for word in ("heard", "left"))
        except RuntimeError:  # the store is gone
            return True

    def part(self) -> None:
        """The job is done. The leader goes last, for it may hold the store."""
        with contextlib.suppress(RuntimeError, TexforceError):
            if self.rank:
                self._set(f"done/{self.rank}", None)
                return
            self._store.wait([f"done/{rank}" for rank in range(1, self.size)], timedelta(seconds=LAST_WORDS))

    def close(self) -> None:
        """Nothing more will be exchanged."""
        import torch.distributed as dist

        self.stopped.set()
        self._pulse.join()
        if dist.is_initialized():
            with contextlib.suppress(RuntimeError):
                dist.destroy_process_group()

    def _set(self, key: str, value: Any) -> None:
        self._store.set(key, pickle.dumps(value))

    def _get(self, key: str) -> Any:
        return pickle.loads(self._store.get(key))

    def _heard(self, ranks: Sequence[int]) -> list[Any]:
        """What the processes `ranks` say at this turn: two words with the store, however many they are, where none is late.

        Raises:
            TexforceError, Interrupted: as `_wait_for`.
        """
        keys = [f"{self._turn}/{rank}" for rank in ranks]
        try:
            self._store.wait(keys, _SLICE)
        except RuntimeError:
            for rank in ranks:
                self._wait_for(rank)
        try:
            return [pickle.loads(word) for word in self._store.multi_get(keys)]
        except RuntimeError as error:
            raise self._gone(error) from error

    def _wait_for(self, rank: int) -> None:
        """Until process `rank` has said its word of this turn.

        Raises:
            TexforceError, Interrupted: one of the others left and said why, ended, or lets this one wait too long without getting on.
        """
        key, begun = f"{self._turn}/{rank}", time.monotonic()
        pulse, alive, looked = "", begun, begun
        while True:
            try:
                self._store.wait([key], _SLICE)
                return
            except RuntimeError as error:  # torch's DistStoreError: not yet; or the store is gone
                self.heed()
                now = time.monotonic()
                if now - looked > _PULSELESS / 2:  # this process was stopped, and may wake up before the others
                    begun, alive = begun + now - looked, now
                looked = now
                try:
                    self._see_who_left()
                    shown = self._shown(rank)
                except RuntimeError:
                    raise self._gone(error) from error
                if pulse and _steps(shown) != _steps(pulse):  # slow, and not hanging
                    begun = now
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
                with contextlib.suppress(RuntimeError, TexforceError):
                    self._set(f"heard/{self.rank}", None)
                if exit_code:
                    raise Interrupted(message, hint, exit_code=exit_code)
                raise TexforceError(message if rank == 0 else f"process {rank}: {message}", hint)

    def _shown(self, rank: int) -> str:
        """The last sign of life of process `rank`, with how far its work has got; "" before the first."""
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

    def _felt_no_pulse(self) -> list[int]:
        """The others that have shown no life since they were looked at before, at least `_PULSELESS` seconds ago."""
        now = time.monotonic()
        if now - self._felt < _PULSELESS:
            return []
        shown = {rank: self._shown(rank) for rank in range(self.size) if rank != self.rank}
        same = any(pulse and pulse == self._pulses.get(rank) for rank, pulse in shown.items())
        self._felt, self._pulses = now, shown
        return self._silent() if same else []  # the whole machine may just have woken up

    def _silent(self) -> list[int]:
        """The others that show no life while three pulses go by: a broken sum does not say whose fault it was."""
        others = [rank for rank in range(self.size) if rank != self.rank]
        try:
            before = [self._shown(rank) for rank in others]
            time.sleep(3 * PULSE)
            return [rank for rank, shown in zip(others, before) if self._shown(rank) == shown]
        except RuntimeError:  # the leader held the store
            return [0] if self.rank else []

    def _lost(self, ranks: Sequence[int], how: str = "") -> Lost:
        return Lost(ranks, self.size, how)

    def _gone(self, error: RuntimeError) -> TexforceError:
        """The store does not answer: the leader holds it."""
        return self._lost([0] if self.rank else [], first_line(error))

    def _show_life(self) -> None:
        count = 0
        while True:
            count += 1
            with contextlib.suppress(RuntimeError, TexforceError):  # the disk may be full for a moment only
                self._set(f"pulse/{self.rank}", f"{count} {self._steps}")
                self._over = self._store.check(["left/0"])  # and to what is set a store says nothing
            self.answered += 1
            if self.stopped.wait(PULSE):
                return


def _steps(shown: str) -> str:
    return shown.partition(" ")[2]


def _told(error: BaseException) -> tuple[str, str | None, int]:
    """An error as the others are told it: message, hint, exit code where it is a request to stop (else 0)."""
    if isinstance(error, Interrupted):
        return error.message, error.hint, error.exit_code
    if isinstance(error, TexforceError):
        return error.message, error.hint, 0
    if isinstance(error, KeyboardInterrupt):
        return "stopped", None, 130
    if isinstance(error, Terminated):
        return "stopped", None, 143
    return f"{type(error).__name__}: {error}", None, 0


def _uuid(device: str) -> str:
    """What tells a GPU from all others, of other machines too."""
    import torch

    return str(torch.cuda.get_device_properties(device).uuid)
