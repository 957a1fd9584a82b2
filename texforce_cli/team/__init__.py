"""The processes of a job: `--num-processes`, or those that `accelerate launch` or torchrun have begun.

What travels between them is small: gradients of the LoRA, rewards, and the leader's word on what comes next. Words go through
the store that every job of torch.distributed has, so that a process that ended, failed or hangs is named instead of waited for,
and waiting can be interrupted; gradients are summed by gloo or NCCL.
"""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
        return self.each(value if self.rank == 0 else None)[0]

    def look(self) -> None:
        """Between exchanges, which may be minutes: raise where one of the others has left or ended."""

    def get_on(self) -> None:
        """Within what may take long: who waits for this process shall know that it does not hang. Raise where the leader has left."""

    def device(self, name: str) -> str:
        """The device of this process where the job's is `name`."""
        return name

    def be_patient(self, seconds: float) -> None:
        """All have loaded what they need; from now on wait for the others at most `seconds`."""

    def leave(self, error: BaseException) -> None:
        """Tell the others why this process goes."""


def launched(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """(rank, number) of this process under `accelerate launch` or torchrun; (0, 1) elsewhere."""
    try:
        rank, size = int(environment.get("RANK", "0")), int(environment.get("WORLD_SIZE", "1"))
    except ValueError:
        return 0, 1
    return (rank, size) if 0 <= rank < size else (0, 1)


def sharing(count: int) -> tuple[int, int]:
    """How many processes share the work where `--num-processes` is `count`: in all, and on this machine."""
    size = launched()[1]
    return (size, int(os.environ.get("LOCAL_WORLD_SIZE", size))) if size > 1 else (count, count)


def machine() -> str:
    """A name of this machine that its processes share."""
    return os.environ.get("GROUP_RANK") or platform.node()
