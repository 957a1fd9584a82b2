"""The faults that a user can mend: one sentence that names the thing, its value and the remedy."""

from __future__ import annotations

from collections.abc import Iterable


def quoted(text: object) -> str:
    """A word of a command that is to be pasted. The shell of Windows knows no single quotes."""
    import shlex
    import subprocess
    import sys

    return subprocess.list2cmdline([str(text)]) if sys.platform == "win32" else shlex.quote(str(text))


def is_utf8(text: str) -> bool:
    """Whether a text can be encoded: an argument that is no UTF-8 holds halves of characters."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def first_line(error: BaseException) -> str:
    """What an error of another library says, short enough for a sentence."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The beginning of a hint: which of the `known` names is near, "" where none is."""
    import difflib

    close = difflib.get_close_matches(name, list(known), n=1)
    return f"did you mean '{close[0]}'? " if close else ""


class TexforceError(Exception):
    """A handled failure (exit code 1). `hint` is the remedy, shown after the message."""

    exit_code = 1

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(TexforceError):
    """The command was asked for in a way it cannot be (exit code 2)."""

    exit_code = 2


class Unsuited(TexforceError):
    """The options do not suit what they were given for. `hint` says which would; no run that has begun goes on with those."""


class Terminated(BaseException):
    """SIGTERM, where the command does not listen for it itself. No boundary for what a plugin raises takes it for the plugin's."""


class Interrupted(TexforceError):
    """The user or the system asked to stop; everything finished is on disk (exit code 130 or 143)."""

    def __init__(self, message: str, hint: str | None = None, *, exit_code: int = 130) -> None:
        super().__init__(message, hint)
        self.exit_code = exit_code
