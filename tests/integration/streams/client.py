"""The client's end of a session in a test: what it sees, and a clock that does not make it wait."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any

from services.gateway.sessions.session import Delta
from services.gateway.text_request import Waiting
from stoker.clock import ManualClock


class HastyClock(ManualClock):
    """Whoever sleeps wakes once others have run, that much later."""

    async def sleep(self, seconds: float) -> None:
        """See `Clock`."""
        self.advance(seconds)
        await asyncio.sleep(0)


@dataclass(slots=True)
class Seen:
    """All that a client sees of an answer: the sink."""

    text: str = ""
    logprobs: list[Any] = field(default_factory=list)
    finish_reason: str | None = None
    news: list[str] = field(default_factory=list)

    async def waiting(self, news: Waiting) -> None:
        """Keep the news."""
        self.news.append(news.state)

    async def delta(self, choice: int, delta: Delta) -> None:
        """Take a piece."""
        self.text += delta.text
        self.logprobs += [
            (
                token.raw,
                token.logprob.hex(),
                token.offset,
                [(top.raw, top.logprob.hex()) for top in token.top],
            )
            for token in delta.tokens
        ]
        self.finish_reason = delta.finish_reason or self.finish_reason
