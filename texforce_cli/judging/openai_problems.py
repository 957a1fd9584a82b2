"""What a server's refusal means for the questions to come: wait, try again, give this one up, or stop."""

from __future__ import annotations

import contextlib
import json
import math
import re
import time
from collections.abc import Callable, Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from texforce_cli.judging.judge import Busy, Failed, Hopeless

_REFUSALS = {"content_filter", "content_policy_violation", "moderation_blocked"}
_MODERATION = re.compile(
    r"\bmoderation\b|\bflagged\b|\bcontent.policy\b|\busage.policy\b|\bsafety.system\b", re.IGNORECASE
)
_ACCOUNT = re.compile(r"\b(account|access|organi[sz]ation|project|key|user)\b", re.IGNORECASE)
_KEY = re.compile(r"\bapi[ _-]?key\b", re.IGNORECASE)
_LOST = (408, 502, 504)
"""A gateway that gave up waiting: the answer may have been made and charged."""
_LONGEST_SAID = 500
_FORMAT = re.compile(r"response_format|json_schema|text\.format|structured.?output", re.IGNORECASE)


class TurnedDown(Exception):
    """A response that is no success: its status, its headers, and of its body the JSON and the server's own sentence."""

    def __init__(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        super().__init__(status)
        self.status, self.headers = status, headers
        self.body: Any = None
        with contextlib.suppress(ValueError, RecursionError):
            self.body = _alone(json.loads(content))
        moved = f"it has moved to {headers.get('location', 'nowhere')}" if 300 <= status < 400 else ""
        message = moved or message_of(self.body) or (_plain(content) if self.body is None else "")
        self.said = f"Error code: {status}" + (f" - {message}" if message else "")


def message_of(body: Any) -> str:
    """The server's own sentence in an answer that tells of an error; nothing where it has none."""
    if not isinstance(body, dict):
        return ""
    error = body.get("error", body)
    messages = [error, *((error.get("message"), error.get("detail")) if isinstance(error, dict) else ())]
    if isinstance(body.get("detail"), list):  # FastAPI's list of what is wrong in the request
        messages.append(json.dumps(body["detail"])[:_LONGEST_SAID])
    return next((message for message in messages if isinstance(message, str)), "")


def _alone(body: Any) -> Any:
    """Gemini sends its errors in a list of one."""
    return body[0] if isinstance(body, list) and len(body) == 1 else body


def _plain(content: bytes) -> str:
    """The beginning of a body that is text; nothing of a page."""
    text = content.decode("utf-8", "replace").strip()
    return "" if text.startswith("<") else text[:_LONGEST_SAID]


def of_status(status: int, headers: Mapping[str, str], body: Any, said: str) -> Busy | Failed | Hopeless:
    """The meaning of an HTTP status; `said` is the server's own sentence."""
    if status in (401, 403) or (status == 400 and _KEY.search(said)):
        return Hopeless(f"the judge does not let us in ({said})", "set OPENAI_API_KEY to a key that may use the model")
    if status == 402 or (status == 429 and "insufficient_quota" in _codes(body)):
        return Hopeless(f"the account has no credit left ({said})")
    if status == 404 or 300 <= status < 400:
        return Hopeless(f"the judge has no such model or address ({said})", "check the model's name and --base-url")
    if status in (429, 503, 529):
        return Busy(f"the judge is busy ({said})", retry_after(headers, time.time()))
    return Failed(
        f"the judge could not answer ({said})",
        retry=status >= 500 or status in (408, 409),
        charged=status in _LOST,
        seconds=retry_after(headers, time.time()),
    )


def is_refusal(status: int, body: Any, said: str) -> bool:
    """Whether an error is the judge's refusal to look at this, by its code or, where that says nothing, by its sentence."""
    about_us = _ACCOUNT.search(said)  # an account that broke a policy gets no answer to anything
    return bool(_codes(body) & _REFUSALS) or bool(
        status in (400, 403, 422) and _MODERATION.search(said) and not about_us
    )


def was_read(body: Any) -> bool:
    """Whether a refusal came from a filter that is paid for what it reads, as Azure's is."""
    return "content_filter" in _codes(body)


def is_about_format(said: str, body: Any) -> bool:
    """Whether an error says that the server knows no JSON schemas."""
    return bool(_FORMAT.search(said) or any(_FORMAT.search(code) for code in _codes(body)))


def of_connection(error: BaseException, timed_out: bool) -> Failed | Hopeless:
    """The meaning of a request without an answer."""
    import httpx2

    chain = list(_causes(error))
    if any("CERTIFICATE_VERIFY_FAILED" in str(one) for one in chain):
        return Hopeless(
            "the judge's certificate cannot be checked",
            "install the system's CA certificates (package ca-certificates), or set SSL_CERT_FILE to a bundle of them",
        )
    unsent = any(isinstance(one, httpx2.ConnectError | httpx2.ConnectTimeout | httpx2.PoolTimeout) for one in chain)
    what = "no answer in time" if timed_out else "the connection failed" if unsent else "the connection was cut"
    return Failed(f"{what} ({type(chain[-1]).__name__})", charged=not unsent, sent=not unsent)


def retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """The seconds that a server asks for: `retry-after-ms`, or `retry-after` as seconds or as a date."""
    given = headers.get("retry-after-ms")
    after = headers.get("retry-after", "")
    readers: list[Callable[[], float]] = [
        lambda: float(given or "") / 1000,
        lambda: float(after),
        lambda: parsedate_to_datetime(after).timestamp() - now,
    ]
    for read in readers:
        try:
            seconds = read()
        except (ValueError, TypeError, OverflowError):
            continue
        if math.isfinite(seconds):
            return max(seconds, 0.0)
    return None


def _codes(body: Any) -> set[str]:
    """The words by which a server names an error."""
    error = body.get("error", body) if isinstance(body, dict) else None
    if not isinstance(error, dict):
        return set()
    return {str(error[name]) for name in ("code", "type", "param") if error.get(name)}


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
