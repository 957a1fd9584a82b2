"""A file of lines to which whole lines are added, each on the disk before the next step."""

from __future__ import annotations

import os
from pathlib import Path

from texforce_cli.errors import TexforceError
from texforce_cli.files import write_error


class Lines:
    """Opened by `opened`, which changes nothing on disk: a torn last line is cut off by the first `append`. One thread at a time."""

    def __init__(self, path: Path, size: int) -> None:
        self.path = path
        self._size = size
        """Bytes of whole lines; what stands behind them is torn."""

    @classmethod
    def opened(cls, path: Path) -> tuple[Lines, list[bytes]]:
        """The file, and the whole lines that are in it.

        Raises:
            TexforceError: it cannot be read.
        """
        try:
            data = path.read_bytes() if path.exists() else b""
        except OSError as error:
            raise TexforceError(
                f"'{path}' cannot be read ({error.strerror or error})", "make it readable, or move it away"
            ) from error
        size = data.rfind(b"\n") + 1
        return cls(path, size), data[:size].split(b"\n")[:-1]

    def append(self, line: bytes) -> None:
        """Add a line: it is on the disk when this returns.

        Raises:
            TexforceError: the disk is full or read-only.
        """
        try:
            self._write(line + b"\n")
        except OSError as error:
            raise write_error(self.path, error) from error

    def _write(self, line: bytes) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("r+b" if self.path.exists() else "xb", buffering=0) as handle:
            # half a line, of a run that was killed or of a disk that was full, must not run into this one
            handle.truncate(self._size)
            handle.seek(self._size)
            written = 0
            while written < len(line):
                written += handle.write(line[written:])
            os.fsync(handle.fileno())
        self._size += len(line)
