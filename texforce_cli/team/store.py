"""Where the processes of a job leave words for each other."""

from __future__ import annotations

import os
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Protocol

from texforce_cli.errors import TexforceError


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
