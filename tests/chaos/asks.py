"""Requests of every kind that a stream may be, and what came of one. Pure.

`asks(count, tokens, seed)` makes distinct requests; `Answer` gathers what a client saw of one, without ids
and times, so that two runs of one request are equal exactly when the client could not tell them apart.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from stoker.v1 import inference_pb2, session_pb2

MODEL = "m"
GRPC_EVERY = 4
"""So many requests have one among them that goes by gRPC."""
WORDS = ("the", "quick", "brown", "fox", "jumps", "over", "lazy", "dog", "vexingly", "five", "dozen", "jugs")


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Ask:
    """One request."""

    name: str
    path: str
    """`/v1/chat/completions` or `/v1/completions`; over gRPC the call that stands for it."""
    body: Mapping[str, Any]
    by_grpc: bool = False
    """It goes to the gateway's gRPC face."""


def asks(count: int, *, tokens: int, seed: int) -> tuple[Ask, ...]:
    """Return `count` distinct requests of about `tokens` tokens per answer."""
    draw = random.Random(seed)
    return tuple(_ask(draw, number, tokens) for number in range(count))


def _ask(draw: random.Random, number: int, tokens: int) -> Ask:
    is_chat = draw.random() < 0.5
    body: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": draw.randint(tokens // 2, tokens),
        "ignore_eos": draw.random() < 0.8,
        "stream": True,
        "stream_options": {"include_usage": True},
        "n": draw.choice((1, 1, 1, 2, 3)),
    } | _choosing(draw, number)
    words = " ".join(draw.choices(WORDS, k=draw.randint(2, 30)))
    if is_chat:
        body["messages"] = [{"role": "user", "content": words}]
    else:
        body["prompt"] = words
    if draw.random() < 0.4:
        body |= {"logprobs": True, "top_logprobs": 2} if is_chat else {"logprobs": 2}
    if draw.random() < 0.4:
        body["stop"] = draw.sample(["qu", "jump", "zy", "fox", "你", "ju", "  "], k=2)
    path = "/v1/chat/completions" if is_chat else "/v1/completions"
    name = f"{number}:{'greedy' if not body['temperature'] else 'sampled'}"
    by_grpc = number % GRPC_EVERY == GRPC_EVERY - 1
    return Ask(name=f"{name} by grpc" if by_grpc else name, path=path, body=body, by_grpc=by_grpc)


def _choosing(draw: random.Random, number: int) -> dict[str, Any]:
    """Return how tokens are chosen: greedy every third, else sampled in all the ways there are."""
    chosen: dict[str, Any] = {"temperature": 0.0, "seed": number}
    if number % 3:
        chosen["temperature"] = draw.choice((0.7, 1.0, 1.3))
        chosen |= draw.choice(
            ({}, {"top_p": 0.9}, {"top_k": 40}, {"min_p": 0.02}, {"top_p": 0.9, "top_k": 60})
        )
    if draw.random() < 0.5:
        chosen |= draw.choice(
            (
                {"frequency_penalty": 0.4},
                {"presence_penalty": 0.6},
                {"repetition_penalty": 1.2},
                {"frequency_penalty": 0.2, "presence_penalty": -0.3},
            )
        )
    return chosen


@dataclass(slots=True)
class Choice:
    """One choice, put together."""

    text: str = ""
    finish_reason: str | None = None
    logprobs: dict[str, list[Any]] = field(default_factory=dict)


@dataclass(slots=True)
class Answer:
    """What a client saw of one request."""

    choices: dict[int, Choice] = field(default_factory=dict)
    usage: dict[str, Any] | None = None
    chunks: int = 0
    """Those that were seen; no part of a comparison."""
    event_id: str = ""
    """Of the last one, by which the rest can be had from another gateway."""

    def add(self, chunk: Mapping[str, Any]) -> None:
        """Take a chunk of a stream."""
        self.chunks += 1
        self.usage = chunk.get("usage") or self.usage
        for part in chunk["choices"]:
            choice = self.choices.setdefault(part["index"], Choice())
            choice.text += part["delta"].get("content") or "" if "delta" in part else part["text"]
            choice.finish_reason = part["finish_reason"] or choice.finish_reason
            for name, values in (part.get("logprobs") or {}).items():
                if values is not None:
                    choice.logprobs.setdefault(name, []).extend(values)

    def add_event(self, event: inference_pb2.TextEvent) -> None:
        """Take an event of a gRPC stream."""
        self.chunks += 1
        self.event_id = event.event_id or self.event_id
        choice = self.choices.setdefault(0, Choice())
        choice.text += event.text
        choice.logprobs.setdefault("tokens", []).extend(
            token.SerializeToString(deterministic=True) for token in event.tokens
        )
        if event.finish_reason:
            choice.finish_reason = session_pb2.FinishReason.Name(event.finish_reason)
            usage = event.usage
            self.usage = {
                "prompt_tokens": usage.prompt_tokens,
                "completion_tokens": usage.completion_tokens,
            }

    @property
    def tokens(self) -> int:
        """Return how many output tokens the usage states."""
        return int(self.usage["completion_tokens"]) if self.usage else 0

    def difference(self, other: Answer) -> str:
        """Return where another answer to the same request differs; empty = nowhere."""
        if self.usage != other.usage:
            return f"usage {self.usage} became {other.usage}"
        for index in sorted(self.choices.keys() | other.choices.keys()):
            ours, theirs = self.choices.get(index), other.choices.get(index)
            if ours != theirs:
                return f"choice {index}: {_shown(ours)} became {_shown(theirs)}"
        return ""


def _shown(choice: Choice | None) -> str:
    """Return a choice for people, its scores as their counts."""
    if choice is None:
        return "none"
    scores = {name: len(values) for name, values in choice.logprobs.items()}
    return f"{choice.text!r} ({choice.finish_reason}, {scores})"
