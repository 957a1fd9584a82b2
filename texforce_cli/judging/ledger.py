"""What all runs of a ranking have spent: a limit is kept over kills and resumes too."""

from __future__ import annotations

import dataclasses
import json
import threading
from pathlib import Path

from texforce_cli.files import Lines
from texforce_cli.judging.prices import Usage

_LARGEST = 10**12
"""What is no number of tokens of anybody's request."""


class Ledger:
    """A file of additions, whose sum is never less than what was used while requests stay within their worst case.

    That is added before a request is sent, and what it did not use is taken off when it has ended: a run that is killed
    between the two leaves the worst. `least` is what was used at least, should the file be gone or older than the answers.

    Raises:
        TexforceError: the file cannot be read.
    """

    def __init__(self, path: Path, least: Usage = Usage()) -> None:
        self._lines, before = Lines.opened(path)
        self._lock = threading.Lock()
        written = Usage()
        for line in before:
            written += _read(line)
        self.before = written.at_least(least)
        """What earlier runs used."""
        self._unwritten = self.before - written

    def add(self, usage: Usage) -> None:
        """Add to the sum: it is on the disk when this returns.

        Raises:
            TexforceError: the disk is full or read-only.
        """
        if usage != Usage():
            with self._lock:
                self._lines.append(json.dumps(dataclasses.asdict(self._unwritten + usage)).encode("ascii"))
                self._unwritten = Usage()


def _read(line: bytes) -> Usage:
    """The addition in a line; none where it is something else."""
    try:
        row = json.loads(line)
        usage = Usage(**row)
        fits = all(type(value) is int and abs(value) < _LARGEST for value in dataclasses.astuple(usage))
        return usage if fits else Usage()
    except (ValueError, TypeError, RecursionError):
        return Usage()
