"""One set of reward workers a machine, however many training processes there are on it.

The first training process of a machine owns the workers and lends them to the others over a local socket, so that a reward
model is in memory once and not once a process.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections.abc import Mapping, Sequence
from multiprocessing.connection import Client, Connection, Listener
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from texforce_cli.errors import TexforceError

if TYPE_CHECKING:
    from texforce_cli.rewards.isolation import IsolatedReward


class Address(NamedTuple):
    """Where the workers of this machine are lent, and the key that only its training processes know."""

    place: str
    key: bytes


class Lender:
    """Scores with `rewards` for whoever asks."""

    def __init__(self, rewards: Mapping[str, IsolatedReward]) -> None:
        self._rewards = rewards
        key = secrets.token_bytes(32)
        self._listener = Listener(authkey=key)
        self.address = Address(str(self._listener.address), key)
        threading.Thread(target=self._accept, name="texforce-lender", daemon=True).start()

    def close(self) -> None:
        """Lend no more."""
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                asker = self._listener.accept()
            except OSError:  # closed
                return
            except Exception:  # someone without the key
                continue
            threading.Thread(target=self._serve, args=(asker,), daemon=True).start()

    def _serve(self, asker: Connection) -> None:
        with asker, contextlib.suppress(EOFError, OSError):
            while True:
                name, *batch = asker.recv()
                try:
                    asker.send((self._rewards[name].score(*batch), None))
                except TexforceError as error:
                    asker.send(((error.message, error.hint), type(error)))


class Lent:
    """A reward whose workers belong to another training process of this machine."""

    input = "uint8"

    def __init__(self, name: str, lender: Address) -> None:
        self.name = name
        try:
            self._owner = Client(lender.place, authkey=lender.key)
        except OSError as error:
            raise self._gone() from error

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float]:
        """One score an image [N].

        Raises:
            TexforceError: as the owner's; it has ended.
        """
        try:
            self._owner.send((self.name, images, list(prompts), [dict(one) for one in metadata]))
            answer, problem = self._owner.recv()
        except (OSError, EOFError) as error:
            raise self._gone() from error
        if problem is not None:
            raise problem(*answer)
        scores: list[float] = answer
        return scores

    def close(self) -> None:
        """Ask no more."""
        self._owner.close()

    def _gone(self) -> TexforceError:
        return TexforceError(f"the process that owns the workers of reward '{self.name}' has ended", "see its messages")
