"""One set of reward workers a machine, however many training processes there are on it.

The first training process of a machine owns the workers and lends them to the others over a local socket, so that a reward
model is in memory once and not once a process.
"""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, answer_challenge, deliver_challenge
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from texforce_cli.errors import TexforceError

if TYPE_CHECKING:
    from texforce_cli.rewards.isolation import IsolatedReward


class Address(NamedTuple):
    """Where the workers of this machine are lent, and the key that only its training processes know."""

    place: str | tuple[str, int]
    key: bytes


class Lender:
    """Scores with `rewards` for whoever asks."""

    def __init__(self, rewards: Mapping[str, IsolatedReward]) -> None:
        self._rewards = rewards
        self._closed = False
        try:
            self._listener = Listener()
        except OSError:  # a socket below TMPDIR, whose path may be too long for one; the key protects this one too
            self._listener = Listener(("127.0.0.1", 0))
        self.address = Address(self._listener.address, secrets.token_bytes(32))
        threading.Thread(target=self._accept, name="texforce-lender", daemon=True).start()

    def close(self) -> None:
        """Lend no more."""
        self._closed = True
        self._listener.close()

    def _accept(self) -> None:
        while not self._closed:
            try:
                asker = self._listener.accept()
            except OSError:  # closed, or one that went away again
                time.sleep(0.05)
                continue
            threading.Thread(target=self._serve, args=(asker,), daemon=True).start()

    def _serve(self, asker: Connection) -> None:
        with asker, contextlib.suppress(EOFError, OSError, AuthenticationError):
            deliver_challenge(asker, self.address.key)  # here and not in `accept`: who does not answer holds up nobody
            answer_challenge(asker, self.address.key)
            while True:
                name, *batch = asker.recv()
                try:
                    asker.send((self._rewards[name].score(*batch), None))
                except TexforceError as error:
                    asker.send(((error.message, error.hint), type(error)))


class Lent:
    """A reward whose workers belong to another training process of this machine."""

    input = "uint8"

    def __init__(self, name: str, lender: Address, timeout: float) -> None:
        """`timeout`: seconds without an answer, more than the owner takes to start a worker anew and ask again."""
        self.name, self.timeout = name, timeout
        try:
            self._owner = Client(lender.place)
            self._wait()
            answer_challenge(self._owner, lender.key)
            deliver_challenge(self._owner, lender.key)
        except (OSError, EOFError) as error:
            raise self._gone() from error

    def score(
        self, images: NDArray[np.uint8], prompts: Sequence[str], metadata: Sequence[Mapping[str, Any]]
    ) -> list[float | None]:
        """One score an image [N]; None for a picture that fails.

        Raises:
            TexforceError: as the owner's; it has ended.
        """
        try:
            self._owner.send((self.name, images, list(prompts), [dict(one) for one in metadata]))
            self._wait()
            answer, problem = self._owner.recv()
        except (OSError, EOFError) as error:
            raise self._gone() from error
        if problem is not None:
            raise problem(*answer)
        scores: list[float | None] = answer
        return scores

    def close(self) -> None:
        """Ask no more."""
        self._owner.close()

    def _wait(self) -> None:
        if not self._owner.poll(self.timeout):
            raise TexforceError(
                f"the process that owns the workers of reward '{self.name}' has not answered for {self.timeout:g} seconds",
                "see its messages",
            )

    def _gone(self) -> TexforceError:
        return TexforceError(f"the process that owns the workers of reward '{self.name}' has ended", "see its messages")
