"""Shapes: answers as OpenAI's JSON. Pure.

A chunk of a stream is put together from constant text and the few values that change: at many tokens per
second, serialising whole objects would cost more than all the rest of the gateway.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from json.encoder import encode_basestring_ascii as quote
from typing import Any, Protocol

from services.gateway.sessions.session import Alternative, Delta, ScoredToken

DONE = b"data: [DONE]\n\n"
LOWEST_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON cannot say; OpenAI's number."""


@dataclass(slots=True, kw_only=True)
class Collected:
    """One answer, whole."""

    texts: list[str] = field(default_factory=list)
    tokens: list[ScoredToken] = field(default_factory=list)
    finish_reason: str | None = None

    def add(self, delta: Delta) -> None:
        """Take what was added."""
        self.texts.append(delta.text)
        self.tokens.extend(delta.tokens)
        self.finish_reason = delta.finish_reason or self.finish_reason


def usage(prompt_tokens: int, completion_tokens: int) -> dict[str, int]:
    """Return OpenAI's usage object."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
    }


class Shape(Protocol):
    """How one request's answers look."""

    def opening(self, choice: int) -> str:
        """Return the SSE message that opens a choice; empty = none."""
        ...

    def chunk(self, choice: int, delta: Delta) -> str:
        """Return what a delta adds to the stream: whole SSE messages; empty when it adds nothing."""
        ...

    def usage_chunk(self, counts: dict[str, int]) -> str:
        """Return the SSE message with the usage; empty when the client did not ask for it."""
        ...

    def whole(self, choices: Sequence[Collected], counts: dict[str, int]) -> bytes:
        """Return the answer in one piece, as JSON."""
        ...


class ChatShape:
    """`chat.completion` and its chunks.

    Args:
        answer_id: The answer's id.
        created_unix_seconds: When.
        model: Name the client asked for.
        include_usage: A stream ends with the usage.
        logprobs: The client asked for log probabilities.
    """

    def __init__(
        self, *, answer_id: str, created_unix_seconds: int, model: str, include_usage: bool, logprobs: bool
    ) -> None:
        self._common = {"id": answer_id, "created": created_unix_seconds, "model": model}
        self._head = _chunk_head("chat.completion.chunk", self._common)
        self._tail = ',"usage":null}\n\n' if include_usage else "}\n\n"
        self._include_usage = include_usage
        self._logprobs = logprobs

    def opening(self, choice: int) -> str:
        """See `Shape`: the role."""
        return self._message(choice, '{"role":"assistant","content":""}', "null", "null")

    def chunk(self, choice: int, delta: Delta) -> str:
        """See `Shape`."""
        message = ""
        if delta.text or delta.tokens:
            logprobs = json.dumps(_chat_logprobs(delta.tokens)) if delta.tokens else "null"
            message = self._message(choice, '{"content":' + quote(delta.text) + "}", logprobs, "null")
        if delta.finish_reason is not None:
            message += self._message(choice, "{}", "null", quote(delta.finish_reason))
        return message

    def usage_chunk(self, counts: dict[str, int]) -> str:
        """See `Shape`."""
        return _usage_chunk(self._head, counts) if self._include_usage else ""

    def whole(self, choices: Sequence[Collected], counts: dict[str, int]) -> bytes:
        """See `Shape`."""
        return _whole(
            "chat.completion",
            self._common,
            [
                {
                    "index": index,
                    "message": {"role": "assistant", "content": "".join(choice.texts), "refusal": None},
                    "logprobs": _chat_logprobs(choice.tokens) if self._logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            counts,
        )

    def _message(self, choice: int, delta: str, logprobs: str, finish: str) -> str:
        return (
            f'{self._head}[{{"index":{choice},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{finish}}}]{self._tail}'
        )


class CompletionShape:
    """`text_completion` and its chunks; arguments as for `ChatShape`."""

    def __init__(
        self, *, answer_id: str, created_unix_seconds: int, model: str, include_usage: bool, logprobs: bool
    ) -> None:
        self._common = {"id": answer_id, "created": created_unix_seconds, "model": model}
        self._head = _chunk_head("text_completion", self._common)
        self._tail = ',"usage":null}\n\n' if include_usage else "}\n\n"
        self._include_usage = include_usage
        self._logprobs = logprobs

    def opening(self, choice: int) -> str:  # noqa: ARG002 - as `Shape` has it
        """See `Shape`: a completion begins with its text."""
        return ""

    def chunk(self, choice: int, delta: Delta) -> str:
        """See `Shape`."""
        if not delta.text and not delta.tokens and delta.finish_reason is None:
            return ""
        logprobs = json.dumps(_legacy_logprobs(delta.tokens)) if delta.tokens else "null"
        finish = "null" if delta.finish_reason is None else quote(delta.finish_reason)
        return (
            f'{self._head}[{{"index":{choice},"text":{quote(delta.text)},"logprobs":{logprobs},'
            f'"finish_reason":{finish}}}]{self._tail}'
        )

    def usage_chunk(self, counts: dict[str, int]) -> str:
        """See `Shape`."""
        return _usage_chunk(self._head, counts) if self._include_usage else ""

    def whole(self, choices: Sequence[Collected], counts: dict[str, int]) -> bytes:
        """See `Shape`."""
        return _whole(
            "text_completion",
            self._common,
            [
                {
                    "index": index,
                    "text": "".join(choice.texts),
                    "logprobs": _legacy_logprobs(choice.tokens) if self._logprobs else None,
                    "finish_reason": choice.finish_reason,
                }
                for index, choice in enumerate(choices)
            ],
            counts,
        )


def _chunk_head(kind: str, common: dict[str, Any]) -> str:
    constants = ",".join(
        f'"{name}":{quote(str(value)) if isinstance(value, str) else value}' for name, value in common.items()
    )
    return f'data: {{"object":"{kind}",{constants},"choices":'


def _usage_chunk(head: str, counts: dict[str, int]) -> str:
    return f'{head}[],"usage":{json.dumps(counts)}}}\n\n'


def _whole(kind: str, common: dict[str, Any], choices: list[dict[str, Any]], counts: dict[str, int]) -> bytes:
    return json.dumps({"object": kind, **common, "choices": choices, "usage": counts}).encode()


def _chat_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    return {
        "content": [
            _scored(token) | {"top_logprobs": [_scored(top) for top in token.top]} for token in tokens
        ],
        "refusal": None,
    }


def _scored(token: Alternative) -> dict[str, Any]:
    return {"token": token.text, "logprob": _finite(token.logprob), "bytes": list(token.raw)}


def _legacy_logprobs(tokens: Sequence[ScoredToken]) -> dict[str, Any]:
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_finite(token.logprob) for token in tokens],
        "top_logprobs": [
            {top.text: _finite(top.logprob) for top in (token, *reversed(token.top))} for token in tokens
        ],
        "text_offset": [token.offset for token in tokens],
    }


def _finite(logprob: float) -> float:
    return max(logprob, LOWEST_LOGPROB)
