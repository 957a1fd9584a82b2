"""Where the processes of a job leave words for each other."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from texforce_cli.errors import TexforceError
from texforce_cli.files import patiently


class Store(Protocol):
    """Words by their keys, as the stores of torch.distributed keep them; RuntimeError where there are none."""

    def set(self, key: str, value: bytes) -> object: ...

    def get(self, key: str) -> bytes: ...

    def multi_get(self, keys: list[str]) -> list[bytes]: ...

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
            patiently(lambda: new.replace(place))
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
            return patiently(self._place(key).read_bytes)
        except OSError as error:
            raise RuntimeError(f"nothing is known of {key}") from error

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """What stands at each."""
        return [self.get(key) for key in keys]

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
        patiently(lambda: self._place(key).unlink(missing_ok=True))
        return True

    def _place(self, key: str) -> Path:
        return self.path / key.replace("/", "-")


_PIECE = 4 * 2**20
"""torch's server closes the connection of who sends it more than 8 MiB at once."""


class Pieces:
    """The store of a launcher for values of any size."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._before: dict[str, int] = {}
        """How many pieces lie beside a key, where there are some."""

    def set(self, key: str, value: bytes) -> None:
        """Whole or not at all: what stands at the key itself comes last."""
        before = max(0, len(value) - 1) // _PIECE
        for number in range(before):
            self._store.set(_beside(key, number), value[number * _PIECE : (number + 1) * _PIECE])
        if before:
            self._before[key] = before
        self._store.set(key, b"%d " % before + value[before * _PIECE :])

    def get(self, key: str) -> bytes:
        """What stands there."""
        return self._whole(key, self._store.get(key))

    def multi_get(self, keys: list[str]) -> list[bytes]:
        """What stands at each, by one word with the server."""
        return [self._whole(key, found) for key, found in zip(keys, self._store.multi_get(keys))]

    def _whole(self, key: str, found: bytes) -> bytes:
        before, _, last = found.partition(b" ")
        return b"".join([*(self._store.get(_beside(key, number)) for number in range(int(before))), last])

    def check(self, keys: list[str]) -> bool:
        """Whether all are there."""
        return self._store.check(keys)

    def wait(self, keys: list[str], timeout: timedelta) -> None:
        """Until all are there."""
        self._store.wait(keys, timeout)

    def delete_key(self, key: str) -> bool:
        """Forget what was set here."""
        for number in range(self._before.pop(key, 0)):
            self._store.delete_key(_beside(key, number))
        return self._store.delete_key(key)


def _beside(key: str, number: int) -> str:
    return f"{key}.{number}"
