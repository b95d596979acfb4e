"""A text request: what both edges, REST and gRPC, hand to the runner; and what the runner tells them back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from services.gateway.sampling import SamplingRequest
from services.gateway.sessions.request_key import RequestKey
from services.gateway.sessions.session import Delta


@dataclass(frozen=True, slots=True, kw_only=True)
class Conversation:
    """Messages to answer."""

    messages: Sequence[Mapping[str, Any]]
    add_generation_prompt: bool = True
    variables: Mapping[str, Any] = field(default_factory=dict)
    """Further names for the chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompts:
    """Texts, or texts as tokens, to continue; each gets its own answers."""

    prompts: Sequence[str | Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TextRequest:
    """One client request."""

    request_id: str
    model: str
    content: Conversation | Prompts
    sampling: SamplingRequest
    choices: int = 1
    """Answers per prompt."""
    whole: bool = False
    """Nothing is sent before the answer is complete."""
    deadline_seconds: float | None = None
    """It is worthless unless its answer begins within this, from its arrival; None = it has all time."""

    key: RequestKey | None = None
    """Under which another gateway may go on with it; None = it ends with this one."""

    @property
    def kind(self) -> str:
        """Return `chat` or `completion`."""
        return "chat" if isinstance(self.content, Conversation) else "completion"

    @property
    def sessions(self) -> int:
        """Return how many answers there will be in all."""
        prompts = 1 if isinstance(self.content, Conversation) else len(self.content.prompts)
        return prompts * self.choices


@dataclass(frozen=True, slots=True, kw_only=True)
class Waiting:
    """The request waits for a replica."""

    state: str
    """`acquiring`, `queued`, `starting` or `resuming`."""
    reason: str = ""
    replica_id: str = ""
    node_id: str = ""
    elapsed_seconds: float = 0.0
    predicted_seconds: float = 0.0
    loaded_fraction: float = 0.0


class Sink(Protocol):
    """Where an answer goes. Calls may come from several tasks; each is one whole message."""

    async def waiting(self, news: Waiting) -> None:
        """Tell the client that its request waits."""
        ...

    async def delta(self, choice: int, delta: Delta) -> None:
        """Give the client what was added to an answer; choices count from 0, prompt by prompt."""
        ...
