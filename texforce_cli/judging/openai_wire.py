"""The two shapes of the OpenAI API: a question as a request's body, an answer's body as text and numbers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from texforce_cli.judging import instructions
from texforce_cli.judging.judge import Repair
from texforce_cli.judging.prices import is_count
from texforce_cli.judging.questions import Question

Url = Callable[[Path, str], str]
Read = tuple[str, str, tuple[int, int], bool, bool]
"""Text, model, (input tokens, output tokens), refused, cut."""


@dataclass(frozen=True)
class Form:
    """What all requests share; `limit` is the name under which a chat server takes the longest answer."""

    model: str
    criteria: tuple[str, ...]
    max_output_tokens: int
    detail: str
    limit: str
    strict: bool = True

    def with_limit(self, name: str) -> Form:
        """The same with another name for the longest answer."""
        return dataclasses.replace(self, limit=name)

    def without_schema(self) -> Form:
        """The same without a JSON schema."""
        return dataclasses.replace(self, strict=False)


def chat_body(
    form: Form, schema: dict[str, Any], question: Question, repairs: Sequence[Repair], url: Url
) -> dict[str, Any]:
    """A body for /chat/completions."""
    content = _content(
        question,
        lambda text: {"type": "text", "text": text},
        lambda path, sha256: {"type": "image_url", "image_url": {"url": url(path, sha256), "detail": form.detail}},
    )
    messages = [
        {"role": "system", "content": instructions.system(question, form.criteria)},
        {"role": "user", "content": content},
        *_again(repairs),
    ]
    body: dict[str, Any] = {"model": form.model, "messages": messages, form.limit: form.max_output_tokens}
    if form.strict:
        named = {"name": "judgment", "strict": True, "schema": schema}
        body["response_format"] = {"type": "json_schema", "json_schema": named}
    return body


def responses_body(
    form: Form, schema: dict[str, Any], question: Question, repairs: Sequence[Repair], url: Url
) -> dict[str, Any]:
    """A body for /responses; the server is asked to keep nothing."""
    content = _content(
        question,
        lambda text: {"type": "input_text", "text": text},
        lambda path, sha256: {"type": "input_image", "image_url": url(path, sha256), "detail": form.detail},
    )
    body: dict[str, Any] = {
        "model": form.model,
        "instructions": instructions.system(question, form.criteria),
        "input": [{"role": "user", "content": content}, *_again(repairs)],
        "max_output_tokens": form.max_output_tokens,
        "store": False,
    }
    if form.strict:
        body["text"] = {"format": {"type": "json_schema", "name": "judgment", "strict": True, "schema": schema}}
    return body


def read_chat(answer: dict[str, Any]) -> Read:
    """What a body from /chat/completions says.

    Raises:
        LookupError, TypeError, AttributeError: it is not of that form.
    """
    choice = answer["choices"][0]
    message, finish = choice["message"], choice.get("finish_reason")
    content = message.get("content") or ""
    if isinstance(content, list):  # some servers answer in parts
        content = "".join(part.get("text") or "" for part in content)
    refusal = message.get("refusal")
    usage = _usage(answer, "prompt_tokens", "completion_tokens")
    text = str(content or refusal or "")
    return text, str(answer.get("model") or ""), usage, bool(refusal) or finish == "content_filter", finish == "length"


def read_responses(answer: dict[str, Any]) -> Read:
    """What a body from /responses says.

    Raises:
        LookupError, TypeError, AttributeError: it is not of that form.
    """
    if answer.get("status") == "failed":
        raise LookupError("no answer was made")
    parts = [part for item in answer["output"] if item.get("type") == "message" for part in item["content"]]
    text = "".join(part["text"] for part in parts if part.get("type") == "output_text")
    refusal = "".join(part["refusal"] for part in parts if part.get("type") == "refusal")
    why = (answer.get("incomplete_details") or {}).get("reason")
    usage = _usage(answer, "input_tokens", "output_tokens")
    refused = bool(refusal) or why == "content_filter"
    return text or refusal, str(answer.get("model") or ""), usage, refused, why == "max_output_tokens"


Part = dict[str, Any]


def _content(question: Question, say: Callable[[str], Part], show: Callable[[Path, str], Part]) -> list[Part]:
    """The text, then each label with its picture."""
    parts = [say(instructions.text_of(question))]
    for label, path, sha256 in zip(question.labels, question.files, question.hashes, strict=True):
        parts += [say(instructions.label_of(label)), show(path, sha256)]
    return parts


def _again(repairs: Sequence[Repair]) -> list[dict[str, Any]]:
    return [
        message
        for repair in repairs
        for message in (
            {"role": "assistant", "content": instructions.quoted(repair)},
            {"role": "user", "content": instructions.again(repair)},
        )
    ]


def _usage(answer: dict[str, Any], *names: str) -> tuple[int, int]:
    """Tokens in and out; 0 where a server does not count. Some count what a model thinks in the total alone."""
    usage = answer.get("usage") or {}
    first, second, total = (value if is_count(value := usage.get(name)) else 0 for name in (*names, "total_tokens"))
    return first, max(second, total - first) if first else second
