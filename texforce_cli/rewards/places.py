"""Where a reward's worker runs: with an interpreter on this machine, or on another one over ssh."""

from __future__ import annotations

import base64
import shlex
import zlib
from dataclasses import dataclass
from pathlib import Path

from texforce_cli.errors import UsageError
from texforce_cli.rewards import worker

_SOURCE = Path(worker.__file__)


@dataclass(frozen=True)
class Place:
    """Where a worker runs: an interpreter here, or one on another machine over ssh."""

    python: str
    host: str = ""

    @classmethod
    def parse(cls, text: str) -> Place:
        """`user@host[:PYTHON]`.

        Raises:
            UsageError: it is no such thing.
        """
        host, _, python = text.partition(":")
        if not host or host.startswith("-") or any(c.isspace() for c in text):
            raise UsageError(
                f"the reward host '{text}' is not user@host[:PYTHON]", "for example ann@gpu2:/opt/iqa/bin/python"
            )
        return cls(python or "python3", host)

    @property
    def command(self) -> list[str]:
        """The command line of a worker there, without the number of its parent."""
        if not self.host:
            return [self.python, "-I", str(_SOURCE)]
        packed = base64.b64encode(zlib.compress(_SOURCE.read_bytes(), 9)).decode()
        program = f"import base64,zlib;exec(zlib.decompress(base64.b64decode('{packed}')))"
        remote = f"{shlex.quote(self.python)} -I -c {shlex.quote(program)}"
        return ["ssh", "-o", "BatchMode=yes", "--", self.host, remote]
