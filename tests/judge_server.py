"""A strict server of the OpenAI API's shape on the loopback: it looks at the pictures, and behaves as a script says."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import socket
import struct
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import uvicorn
from PIL import Image
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route

CHAT_KEYS = {"model", "messages", "response_format", "max_tokens", "max_completion_tokens"}
RESPONSES_KEYS = {"model", "instructions", "input", "text", "max_output_tokens", "store"}


@dataclass(frozen=True)
class Seen:
    """A request as the server understood it."""

    number: int
    api: str
    mode: str
    labels: tuple[str, ...]
    brightness: tuple[float, ...]
    prompt: str
    attempt: int
    schema: bool
    key: str


Script = Callable[[Seen], str]


class JudgeServer:
    """Runs while the block does. `script` chooses a behaviour for each request; `faults` are breaches of the shape.

    `limit` (n, seconds): no more than n answers in a window, 429 beyond. `forbidden` must not stand in any request.
    """

    def __init__(
        self,
        script: Script | str = "truthful",
        *,
        limit: tuple[int, float] | None = None,
        forbidden: Sequence[str] = (),
        usage: tuple[int, int] = (600, 50),
    ) -> None:
        self.script: Script = script if callable(script) else lambda seen: script
        self.limit, self.forbidden, self.usage = limit, forbidden, usage
        self.seen: list[Seen] = []
        self.faults: list[str] = []
        self.refused_by_limit = 0
        self.at_once = self.most_at_once = 0
        self.times: list[float] = []
        self._window = (0.0, 0)

    def __enter__(self) -> JudgeServer:
        self._socket = socket.socket()
        self._socket.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}/v1"
        app = Starlette(
            routes=[Route(path, self._answer, methods=["POST"]) for path in ("/v1/chat/completions", "/v1/responses")]
        )
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", loop="asyncio"))
        self._thread = threading.Thread(target=self._server.run, kwargs={"sockets": [self._socket]}, daemon=True)
        self._thread.start()
        while not self._server.started:
            time.sleep(0.005)
        return self

    def __exit__(self, *error: object) -> None:
        self._server.should_exit = True
        self._thread.join(10)
        self._socket.close()

    async def _answer(self, request: Request) -> Response:
        raw = (await request.body()).decode("utf-8")
        try:
            seen = self._read(request, raw)
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {error}")
            return _error(400, f"bad shape: {error}")
        self.seen.append(seen)
        self.times.append(time.monotonic())
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            return self._limited() or await self._behave(self.script(seen), seen)
        finally:
            self.at_once -= 1

    def _limited(self) -> Response | None:
        if self.limit is None:
            return None
        count, seconds = self.limit
        now = time.monotonic()
        began, used = self._window if now - self._window[0] < seconds else (now, 0)
        self._window = (began, used + 1)
        if used < count:
            return None
        self.refused_by_limit += 1
        wait = {"retry-after-ms": str(int((began + seconds - now) * 1000) + 1)}
        return _error(429, "slow down", "rate_limit_exceeded", wait)

    async def _behave(self, name: str, seen: Seen) -> Response:
        verdict = {c: {"reason": f"the brightest, says {c}", **_choice(seen, name)} for c in ("aesthetic", "alignment")}
        text = json.dumps(verdict)
        errors = {
            "401": lambda: _error(401, f"Incorrect API key provided: {seen.key}", "invalid_api_key"),
            "400 key": lambda: JSONResponse([{"error": {"code": 400, "message": "API key not valid."}}], 400),
            "404": lambda: _error(404, "no such model", "model_not_found"),
            "429": lambda: _error(429, "slow down", "rate_limit_exceeded", {"retry-after": "0"}),
            "quota": lambda: _error(429, "no credit", "insufficient_quota"),
            "500": lambda: _error(500, f"broken, with {seen.key}"),
            "500 later": lambda: _error(500, "broken for a moment", headers={"retry-after": "1"}),
            "429 later": lambda: _error(429, "slow down", "rate_limit_exceeded", {"retry-after": "1"}),
            "moderated": lambda: _error(403, "Your input was flagged by the moderation of the provider"),
            "drip": lambda: StreamingResponse(_drops()),
            "401 drip": lambda: StreamingResponse(_drops(), 401),
            "500 flood": lambda: StreamingResponse(_flood(), 500),
            "moved": lambda: _error(307, "", headers={"location": "http://127.0.0.1:9/v1/elsewhere"}),
            "error as success": lambda: _error(200, "the provider is down"),
            "503": lambda: _error(503, "overloaded"),
            "400": lambda: _error(400, "pictures are not supported"),
            "filtered": lambda: _error(400, "not this one", "content_filter"),
            "cut": lambda: StreamingResponse(_half(), headers={"content-length": "1000"}),
            "html": lambda: PlainTextResponse("<html>a proxy's page</html>"),
        }
        if name in errors:
            return errors[name]()
        if name == "schemaless" and seen.schema:
            return _error(400, "response_format of type json_schema is not supported")
        if name == "slow":
            await asyncio.sleep(0.3)
        texts = {
            "fenced": f"Here it is:\n```json\n{text}\n```\nBest regards",
            "truncated": text[: len(text) // 2],
            "length": text[: len(text) // 2],
            "duplicate": text.replace('{"aesthetic"', '{"aesthetic": {}, "aesthetic"', 1),
            "free": "I like the first one.",
            "echo": f"I was asked with {seen.key}",
            "echo escaped": text.replace("the brightest", "".join(f"\\u{ord(letter):04x}" for letter in seen.key)),
            "refusal": "I cannot look at this.",
        }
        finish = {"length": "length"}.get(name, "stop")
        make = _chat if seen.api == "chat" else _responses
        return JSONResponse(make(texts.get(name, text), name == "refusal", finish, self.usage))

    def _read(self, request: Request, raw: str) -> Seen:
        told = f"{request.url} {request.headers.raw} {raw}"
        for word in self.forbidden:
            _must(word not in told, f"{word!r} was told")
        scheme, _, key = request.headers.get("authorization", "").partition(" ")
        _must(scheme == "Bearer" and bool(key), "no key")
        body = json.loads(raw)
        api = "chat" if request.url.path.endswith("completions") else "responses"
        system, content, turns, schema = (_chat_parts if api == "chat" else _responses_parts)(body)
        texts = [part["text"] for part in content if "text" in part]
        urls = [part["image_url"] for part in content if "image_url" in part]
        kinds = ["text" if "text" in part else "picture" for part in content]
        labels = [text.removeprefix("Picture ").removesuffix(":") for text in texts[1:]]
        _must(kinds == ["text"] + ["text", "picture"] * len(urls), f"parts in the order {kinds}")
        _must(labels == list("ABCDEFGHIJ"[: len(urls)]), f"labels {labels}")
        roles = [turn["role"] for turn in turns]
        _must(roles == ["assistant", "user"] * (len(turns) // 2), f"roles {roles}")
        mode = "pointwise" if '"score"' in system else "listwise" if '"ranks"' in system else "pairwise"
        if schema is not None:
            _strict(schema["schema"])
            _must(schema["strict"] is True and bool(schema["name"]), "a schema that is not strict")
        light = tuple(_brightness(url if isinstance(url, str) else url["url"]) for url in urls)
        prompt = json.loads(texts[0].removeprefix("The text: "))
        number = len(self.seen)
        return Seen(number, api, mode, tuple(labels), light, prompt, len(turns) // 2, schema is not None, key)


def _chat_parts(body: dict[str, Any]) -> tuple[str, list[Any], list[Any], Any]:
    _must(set(body) <= CHAT_KEYS, f"keys {sorted(body)}")
    _must(("max_tokens" in body) != ("max_completion_tokens" in body), "one limit")
    system, user, *turns = body["messages"]
    _must((system["role"], user["role"]) == ("system", "user"), "system, then user")
    for part in user["content"]:
        _must(part["type"] in ("text", "image_url"), part["type"])
    form = body.get("response_format")
    _must(form is None or form["type"] == "json_schema", "another format")
    return system["content"], user["content"], turns, form and form["json_schema"]


def _responses_parts(body: dict[str, Any]) -> tuple[str, list[Any], list[Any], Any]:
    _must(set(body) <= RESPONSES_KEYS and body["store"] is False, f"keys {sorted(body)}")
    user, *turns = body["input"]
    for part in user["content"]:
        _must(part["type"] in ("input_text", "input_image"), part["type"])
    return body["instructions"], user["content"], turns, body.get("text") and body["text"]["format"]


def _must(holds: bool, what: str) -> None:
    if not holds:
        raise ValueError(what)


def _strict(schema: Any) -> None:
    """Every object of a strict schema closes its keys and requires all of them."""
    if schema.get("type") == "object":
        _must(schema["additionalProperties"] is False, "an open object")
        _must(schema["required"] == list(schema["properties"]), "a key that is not required")
        for inner in schema["properties"].values():
            _strict(inner)


def _brightness(url: str) -> float:
    data = base64.b64decode(url.removeprefix("data:image/png;base64,"), validate=True)
    position = 8
    while position < len(data):
        length, kind = struct.unpack(">I4s", data[position : position + 8])
        _must(kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"), f"chunk {kind!r}")
        position += 12 + length
    _must(position == len(data), "bytes behind the picture")
    return float(np.asarray(Image.open(io.BytesIO(data)).convert("L")).mean())


def _choice(seen: Seen, name: str) -> dict[str, Any]:
    light = [-float(slot) for slot in range(len(seen.labels))] if name == "first" else list(seen.brightness)
    if name == "wrong":
        return {"winner": "Z"}
    if seen.mode == "pointwise":
        return {"score": 1 + round(light[0] / 255 * 9)}
    if seen.mode == "listwise":
        return {"ranks": {label: 1 + sum(other > own for other in light) for label, own in zip(seen.labels, light)}}
    if name != "first" and light[0] == light[1]:
        return {"winner": "tie"}
    return {"winner": seen.labels[int(np.argmax(light))]}


def _error(status: int, message: str, code: str = "", headers: dict[str, str] | None = None) -> Response:
    return JSONResponse({"error": {"message": message, "code": code or None}}, status, headers)


async def _half() -> AsyncIterator[bytes]:
    yield b'{"choices": ['
    raise ConnectionResetError


async def _drops() -> AsyncIterator[bytes]:
    """An answer of which each byte comes in time, and which never ends."""
    while True:
        yield b" "
        await asyncio.sleep(0.1)


async def _flood() -> AsyncIterator[bytes]:
    """An answer without an end, as fast as it is read."""
    while True:
        yield b" " * 1_000_000
        await asyncio.sleep(0)


def _chat(text: str, refusal: bool, finish: str, usage: tuple[int, int]) -> dict[str, Any]:
    message = {"role": "assistant", "content": None if refusal else text, "refusal": text if refusal else None}
    return {
        "model": "judge-2026",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": usage[0], "completion_tokens": usage[1]},
    }


def _responses(text: str, refusal: bool, finish: str, usage: tuple[int, int]) -> dict[str, Any]:
    part = {"type": "refusal", "refusal": text} if refusal else {"type": "output_text", "text": text}
    cut = finish == "length"
    return {
        "model": "judge-2026",
        "status": "incomplete" if cut else "completed",
        "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
        "output": [{"type": "reasoning", "summary": []}, {"type": "message", "content": [part]}],
        "usage": {"input_tokens": usage[0], "output_tokens": usage[1]},
    }
