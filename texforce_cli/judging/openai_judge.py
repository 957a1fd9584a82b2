"""A judge behind the OpenAI API: OpenAI itself, or a server that speaks it (vLLM, Ollama, LM Studio, llama.cpp, SGLang)."""

from __future__ import annotations

import ipaddress
import json
import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from texforce_cli.errors import TexforceError, UsageError
from texforce_cli.judging import instructions
from texforce_cli.judging.answers import encodable, schema
from texforce_cli.judging.judge import AESTHETIC, ALIGNMENT, Busy, Failed, Hopeless, Repair, Reply
from texforce_cli.judging.openai_problems import (
    TurnedDown,
    is_about_format,
    is_refusal,
    message_of,
    of_connection,
    of_status,
    was_read,
)
from texforce_cli.judging.openai_wire import Form, chat_body, read_chat, read_responses, responses_body
from texforce_cli.judging.pixels import data_url
from texforce_cli.judging.prices import Size
from texforce_cli.judging.questions import MODES, Question

OPENAI = "https://api.openai.com/v1"
_CRITERION = re.compile(r"[a-z][a-z0-9_-]{0,30}")
_SHORTEST_KEY = 8
"""A shorter key is a stand-in such as "none" or "x": not secret, and found in any text."""
_LONGEST_ANSWER = 10_000_000
"""Bytes of an answer that are read."""
_LONGEST_RAW = 100_000
"""Letters of a server's whole answer that are kept; longer ones leave the text alone."""
_SCHEMA_VERSION = 1
_KEY = "OPENAI_API_KEY"


class OpenAIJudge:
    """Asks a model with eyes through the chat or the responses API. The key is OPENAI_API_KEY.

    A request holds the prompt, labels and pixels: no names, files, seeds. No temperature is sent (many models refuse one).
    `api` is chat or responses, `criteria` a sequence or one text with commas.
    `notes` are sentences on what the server turned out not to know.

    Raises:
        UsageError: the address is none, or there is no such API.
    """

    modes = MODES

    def __init__(
        self,
        model: str,
        *,
        base_url: str | None = None,
        api: str = "chat",
        criteria: Sequence[str] | str = (AESTHETIC, ALIGNMENT),
        max_output_tokens: int = 1000,
        timeout: float = 120.0,
        detail: str = "high",
    ) -> None:
        self._url = base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        self._host, self._loopback = _host(self._url)
        if api not in ("chat", "responses"):
            raise UsageError(f"there is no API '{api}'", "choose chat or responses")
        if max_output_tokens < 1:
            raise UsageError(f"an answer cannot have {max_output_tokens} tokens", "allow 300 or more")
        self.model, self.api = model, api
        self.criteria = tuple(criteria.split(",") if isinstance(criteria, str) else criteria)
        if len(set(self.criteria)) != len(self.criteria) or not all(map(_CRITERION.fullmatch, self.criteria)):
            raise UsageError(f"the criteria '{','.join(self.criteria)}' are no distinct words", "aesthetic,alignment")
        if not 0 < timeout < math.inf:
            raise UsageError(f"the timeout of {timeout} seconds is no time", "for example timeout=120")
        self._timeout = timeout
        self._form = Form(model, self.criteria, max_output_tokens, detail, "max_tokens")
        if self._host == _host(OPENAI)[0]:
            self._form = self._form.with_limit("max_completion_tokens")
        self.identity = json.dumps(
            {
                "api": api,
                "model": model,
                "host": self._host,
                "template": instructions.VERSION,
                "schema": _SCHEMA_VERSION,
                "criteria": self.criteria,
                "max_output_tokens": max_output_tokens,
                "detail": detail,
            }
        )
        self.notes: list[str] = []
        self._key = ""
        self._client: Any = None
        self._lock = threading.Lock()

    def connect(self) -> None:
        """Load the SDK and read the key, so that what is missing is said before the work starts; sends nothing.

        Raises:
            TexforceError: the SDK is not installed.
            UsageError: there is no key.
        """
        with self._lock:
            if self._client is not None:
                return
            try:
                import openai
            except ImportError as error:
                raise TexforceError(
                    "this judge needs the package 'openai'", "pip install 'texforce[openai]'"
                ) from error
            self._key = _read_key(self._loopback)
            # not from within a row of backslashes: each of a thousand would be tried to the end
            self._key_in_json = re.compile(r"(?<!\\)" + "".join(map(_letter_in_json, self._key)), re.IGNORECASE)
            self._client = openai.OpenAI(
                api_key=self._key or "none",
                base_url=self._url,
                timeout=self._timeout,
                max_retries=0,
                http_client=openai.DefaultHttpxClient(
                    trust_env=not self._loopback,  # a proxy must not come between us and this machine
                    event_hooks={"response": [self._turn_down]},
                ),
            )

    def size(self, question: Question, repairs: Sequence[Repair] = ()) -> Size:
        """The bytes of a request without its pictures, their number, and the longest answer."""
        body = self._body(self._form, question, repairs, lambda path, sha256: "")
        text = json.dumps(body, ensure_ascii=False).encode("utf-8")
        return Size(len(text), len(question.files), self._form.max_output_tokens)

    def ask(self, question: Question, repairs: Sequence[Repair] = ()) -> Reply:
        """Send one request.

        Raises:
            Busy, Failed, Hopeless
        """
        self.connect()
        import httpx2
        import openai

        form = self._form
        body = self._body(form, question, repairs, data_url)
        # raised outside of the handlers, so that no traceback shows the SDK's own errors, which may quote the key
        problem: TexforceError
        try:
            return self._read(self._send(body))
        except TurnedDown as error:
            said = self._scrubbed(error.said)
            adapted = self._adapted(form, error.status, said, error.body)
            if adapted is None and is_refusal(error.status, error.body, said):
                return Reply("", refused=True, raw=said, charged=was_read(error.body))
            problem = adapted or of_status(error.status, error.headers, error.body, said)
        except openai.APIConnectionError as error:
            problem = of_connection(error, isinstance(error, openai.APITimeoutError))
        except httpx2.HTTPError as error:
            problem = of_connection(error, isinstance(error, httpx2.TimeoutException))
        except openai.OpenAIError as error:
            problem = Failed(f"the judge could not be asked ({self._scrubbed(str(error))})")
        except (Busy, Failed, Hopeless) as error:
            problem = error
        raise problem

    def close(self) -> None:
        """Let the connections go."""
        with self._lock:
            if self._client is not None:
                self._client.close()
                self._client = None

    def _body(
        self, form: Form, question: Question, repairs: Sequence[Repair], url: Callable[[Path, str], str]
    ) -> dict[str, Any]:
        answer = schema(question.mode, question.labels, self.criteria)
        make = chat_body if self.api == "chat" else responses_body
        return make(form, answer, question, repairs, url)

    def _send(self, body: dict[str, Any]) -> bytes:
        client = self._client.with_streaming_response
        create = client.chat.completions.create if self.api == "chat" else client.responses.create
        with create(**body) as response:
            return self._whole(response)

    def _whole(self, response: Any) -> bytes:
        """The body. Once it begins to come, all of it must come in the time that is allowed, not only each piece."""
        body, end = bytearray(), time.monotonic() + self._timeout
        for part in response.iter_bytes():
            body += part
            if time.monotonic() > end:
                raise Failed(f"no whole answer within {self._timeout:g} s", charged=True)
            if len(body) > _LONGEST_ANSWER:
                raise Failed("the server's answer does not end", charged=True)
        return bytes(body)

    def _turn_down(self, response: Any) -> None:
        """Stop at a response that is no success: the SDK would read its body without limits, and follow it elsewhere."""
        import httpx2

        if response.is_success:
            return
        try:
            content = self._whole(response)
        except (Failed, httpx2.HTTPError):  # what was cut still has its status
            content = b""
        raise TurnedDown(response.status_code, response.headers, content)

    def _read(self, content: bytes) -> Reply:
        """The reply in a server's answer, without the key where a server echoes it."""
        answer: Any = None
        try:
            answer = json.loads(content)
            if not isinstance(answer, dict):
                raise ValueError
            text, model, usage, refused, cut = (read_chat if self.api == "chat" else read_responses)(answer)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            said = self._scrubbed(message_of(answer))
            what = "the server's answer is not of the API's form"
            raise Failed(f"{what} ({said})" if said else what, charged=True) from None
        model = encodable(self._without_key(model)[:200])
        raw = self._without_key(json.dumps(answer))
        return Reply(self._without_key(text), model, *usage, refused, cut, raw if len(raw) <= _LONGEST_RAW else "")

    def _adapted(self, form: Form, status: int, said: str, body: Any) -> Failed | None:
        """Leave out what the server does not know, for the rest of the run; the question is asked again."""
        if status not in (400, 422):
            return None
        if form.strict and is_about_format(said, body):
            self._learn(
                form.without_schema(), "the server knows no JSON schema; the form of answers is asked for in words"
            )
        elif form.limit == "max_tokens" and "max_completion_tokens" in said:
            self._learn(form.with_limit("max_completion_tokens"), "the server wants 'max_completion_tokens'")
        else:
            return None
        return Failed(f"the server refused the form of the request ({said})")

    def _learn(self, form: Form, note: str) -> None:
        with self._lock:
            self._form = form
            if note not in self.notes:
                self.notes.append(note)

    def _without_key(self, text: str) -> str:
        return self._key_in_json.sub("(key)", text) if len(self._key) >= _SHORTEST_KEY else text

    def _scrubbed(self, text: str) -> str:
        """What a server said, on one line, at a bearable length and without the key."""
        return " ".join(self._without_key(text).split())[:300]


def _letter_in_json(letter: str) -> str:
    """A pattern for a letter of the key as it is, or escaped as JSON allows, once or within a text that holds JSON."""
    return rf"(?:\\*{re.escape(letter)}|\\+u{ord(letter):04x})"


def _host(url: str) -> tuple[str, bool]:
    """Host and port of an address, without user and password, and whether it is this machine."""
    try:
        parts = urlsplit(url)
        name, port = parts.hostname or "", parts.port
    except ValueError:
        name, port, parts = "", None, urlsplit("")
    if parts.scheme not in ("http", "https") or not name:
        raise UsageError("the address of the judge is no URL", "give one such as http://localhost:8000/v1")
    try:
        loopback = ipaddress.ip_address(name).is_loopback
    except ValueError:
        loopback = name == "localhost"
    return (f"{name}:{port}" if port else name), loopback


def _read_key(loopback: bool) -> str:
    """The key, or nothing where a server on this machine needs none."""
    key = os.environ.get(_KEY, "").strip()
    if not key and not loopback:
        raise UsageError("there is no key for the judge", f"set {_KEY}")
    if not (key.isascii() and key.isprintable()):
        raise UsageError(f"{_KEY} holds characters that no key has", "copy the key again")
    return key
