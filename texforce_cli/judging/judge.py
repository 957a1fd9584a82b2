"""What a judge offers; built-in judges, those of plugins and servers behind the OpenAI API are all of this form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from texforce_cli.errors import TexforceError
from texforce_cli.judging.questions import Mode, Question

AESTHETIC, ALIGNMENT = "aesthetic", "alignment"
"""The paper's two criteria: aesthetic quality, and coherence of the picture with the text."""


@dataclass(frozen=True)
class Reply:
    """A raw answer. `model` is who the server says that it is; `refused` where it would not answer; `raw` all that a server
    sent, where there is more than the text. Not `charged`: it was turned away before anything was computed."""

    text: str
    model: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    refused: bool = False
    cut: bool = False
    raw: str = ""
    charged: bool = True


@dataclass(frozen=True)
class Repair:
    """An answer that could not be used, and why: the judge is shown both when it is asked again."""

    text: str
    why: str


class Busy(TexforceError):
    """The judge asks for patience (rate limit, overload): ask again, no sooner than in `seconds` where it says so."""

    def __init__(self, message: str, seconds: float | None = None) -> None:
        super().__init__(message)
        self.seconds = seconds


class Failed(TexforceError):
    """This question got no answer (cut connection, time out, server error); asking again may help unless `retry` is off.

    `charged` says that the answer may have been made, and paid for, before it was lost; `seconds` is the wait that the
    judge asks for. Not `asked`: the fault is the question's own (a picture that cannot be read), and says nothing of the judge.
    Not `sent`: no server has received it, so that it counts as no request.
    """

    def __init__(
        self,
        message: str,
        hint: str | None = None,
        *,
        retry: bool = True,
        charged: bool = False,
        seconds: float | None = None,
        asked: bool = True,
        sent: bool = True,
    ) -> None:
        super().__init__(message, hint)
        self.retry = retry
        self.charged = charged
        self.seconds = seconds
        self.asked = asked
        self.sent = sent and asked


class Hopeless(TexforceError):
    """No question will get an answer (wrong key, unknown model, no credit): stop at once."""


class Judge(Protocol):
    """Called from several threads at once. Errors other than those above end the run.

    Optional: `prepare(cases, data)`, called once before anything else with the cases and the hash of the pictures;
    `close()`; `notes`, a list of sentences for the user; `size(question, repairs)` as in `budget.Metered`, needed for
    `--max-cost`; `setting`, what tells its rankings from those of the same judge with other options (else `identity`).
    """

    identity: str
    """All that its answers depend on beside the question, without secrets: a part of each judgment's key."""

    criteria: tuple[str, ...]
    modes: tuple[Mode, ...]

    def ask(self, question: Question, repairs: Sequence[Repair] = ()) -> Reply:
        """Answer with the JSON of `answers.schema`.

        Raises:
            Busy, Failed, Hopeless
        """
        ...
