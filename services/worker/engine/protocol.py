"""The `Engine` protocol: what a worker asks of whatever runs its model, and the messages between them.

An engine is a pure token machine. It knows no text, no epochs, no clients: token ids go in, token ids come
out, and a session is nothing but numbers. Four rules hold for every engine:

1. The result of a session depends only on its own `Submit`, never on what else is in the batch.
2. The noise of output position `i` depends only on `(seed, i)`, so any engine can continue any session.
3. A session continued from its tokens with `ResumeMode.EXACT` gives bitwise the tokens and log probabilities
   that the uninterrupted session would have given on the same kind of device.
4. Everything is bounded: batch, waiting queue, context and KV tokens (`EngineLimits`).

Threads: `submit`, `cancel` and `stats` may be called from any thread and never wait for a step; `step`,
`snapshot`, `export_kv`, `take_kv`, `hold` and `close` belong to the one thread that drives the engine
(`engine_thread.EngineThread`).
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from stoker.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import torch

    from services.worker.engine.adapted_rows import AdapterWeights
    from services.worker.kv.kv_exchange import KvReader, StagedKv
    from services.worker.kv.kv_format import KvLayout
    from stoker.ids import SessionId

MAX_TOP_LOGPROBS = 20
"""As many alternatives per token as OpenAI's API offers."""

MAX_PENALTY = 2.0
"""Presence and frequency penalties lie in [-2, 2], as in OpenAI's API."""

SEED_BITS = 64


class FinishReason(enum.StrEnum):
    """Why a session ended."""

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"
    ERROR = "error"


class ResumeMode(enum.StrEnum):
    """How tokens that were generated elsewhere get into the KV cache."""

    EXACT = "exact"
    """Through the decode path, row by row: bit-identical to the uninterrupted session, also in bf16."""

    FAST = "fast"
    """In one prefill pass with the prompt: cheaper; may differ in the last bits, hence in bf16 in tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """How to choose each next token. The defaults are greedy decoding to the end of the context.

    Raises:
        InvalidRequest: A value is out of its range; `param` names the field.
    """

    temperature: float = 0.0
    """0 is greedy (arg max, no noise); else logits are divided by it. [0, ∞)."""
    top_p: float = 1.0
    """Keep the smallest set of most likely tokens whose probability reaches this. (0, 1]."""
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this fraction as likely as the most likely one. [0, 1]."""
    repetition_penalty: float = 1.0
    """Divide positive, multiply negative logits of tokens in prompt or output. (0, ∞)."""
    presence_penalty: float = 0.0
    """Subtract from the logits of tokens in the output. [-2, 2]."""
    frequency_penalty: float = 0.0
    """Subtract, times the count, from the logits of tokens in the output. [-2, 2]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Add to the logits of these token ids."""
    seed: int = 0
    """Key of the noise, as an unsigned 64-bit number (taken modulo 2**64)."""
    max_tokens: int | None = None
    """Output tokens in the session's whole life, resumed ones included; None: to the end of the context."""
    min_tokens: int = 0
    """Stop tokens can't be chosen before this many output tokens."""
    stop_token_ids: frozenset[int] = frozenset()
    """Tokens that end the session, the model's end-of-sequence tokens included by whoever submits."""
    ignore_eos: bool = False
    """Don't end on stop tokens: run to the token limit (for benchmarks)."""
    top_logprobs: int | None = None
    """None: no log probabilities; n: the chosen token's and those of the n most likely. [0, 20]."""

    def __post_init__(self) -> None:
        """Refuse what no model can obey."""
        self._demand("temperature", self.temperature >= 0, "be at least 0")
        self._demand("top_p", 0 < self.top_p <= 1, "lie in (0, 1]")
        self._demand("top_k", self.top_k >= 0, "be at least 0 (0 keeps all)")
        self._demand("min_p", 0 <= self.min_p <= 1, "lie in [0, 1]")
        self._demand("repetition_penalty", self.repetition_penalty > 0, "be above 0")
        for name in ("presence_penalty", "frequency_penalty"):
            self._demand(name, abs(getattr(self, name)) <= MAX_PENALTY, "lie in [-2, 2]")
        self._demand("logit_bias", all(map(math.isfinite, self.logit_bias.values())), "be finite")
        self._demand("max_tokens", self.max_tokens is None or self.max_tokens >= 1, "be at least 1")
        self._demand("min_tokens", self.min_tokens >= 0, "be at least 0")
        self._demand(
            "top_logprobs",
            self.top_logprobs is None or 0 <= self.top_logprobs <= MAX_TOP_LOGPROBS,
            f"lie in [0, {MAX_TOP_LOGPROBS}]",
        )
        for name in ("temperature", "repetition_penalty"):
            self._demand(name, math.isfinite(getattr(self, name)), "be finite")

    def _demand(self, name: str, holds: bool, rule: str) -> None:  # noqa: FBT001 - the condition itself
        if not holds:
            raise InvalidRequest(f"{name} is {getattr(self, name)}; it must {rule}", param=name)

    @property
    def has_penalties(self) -> bool:
        """Say whether past tokens change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Submit:
    """Start a session, or continue one after the tokens it already generated."""

    session_id: SessionId
    prompt_token_ids: Sequence[int]
    """At least one token."""
    generated_token_ids: Sequence[int] = ()
    """Output tokens the client already has: not emitted again; the next one has position `len` of these."""
    resume_mode: ResumeMode = ResumeMode.EXACT
    sampling: Sampling = field(default_factory=Sampling)
    adapter: AdapterWeights | None = None
    """What is added to the model for this session; None: the model as it is."""
    staged: StagedKv | None = None
    """Keys and values of its first tokens, made by `Engine.stage_kv`; the session owns them once it is
    accepted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """One alternative: natural logarithm of the model's own probability of the token."""

    token_id: int
    logprob: float


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionTimings:
    """Where a session's time went in this engine, so far."""

    queue_seconds: float = 0.0
    """From `submit` to the start of its prefill."""
    prefill_seconds: float = 0.0
    """From there until its first new token was chosen; the replay of resumed tokens included."""
    decode_seconds: float = 0.0
    """From there to its last token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenOut:
    """One generated token. A stop token is emitted too, followed by its `Finished`."""

    session_id: SessionId
    position: int
    """Output position, from 0, counting resumed tokens."""
    token_id: int
    logprob: float | None = None
    """Of the model's raw distribution: log softmax before bias, penalties, temperature. None: not asked."""
    top_logprobs: tuple[TokenLogprob, ...] = ()
    """Most likely first, ties by lower token id; empty unless asked for."""
    timings: SessionTimings | None = None
    """Only with the first token a session gets from this engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """The last message of a session."""

    session_id: SessionId
    reason: FinishReason
    prompt_token_count: int
    generated_token_count: int
    """Resumed tokens and a stop token included."""
    stop_token_id: int | None = None
    """Which token stopped it, when `reason` is STOP; it was emitted as the last `TokenOut`."""
    timings: SessionTimings = field(default_factory=SessionTimings)
    message: str = ""
    """What went wrong, when `reason` is ERROR."""


Output = TokenOut | Finished


@dataclass(frozen=True, slots=True, kw_only=True)
class KvExport:
    """Keys and values of a session's first `token_count` tokens, on the CPU.

    One tensor per layer, of shape [2 (keys, values), kv heads, tokens, head dim], in the engine's dtype, with
    the rotary embedding applied to the keys. Engines of the same model and dtype can exchange them.
    """

    token_count: int
    layers: tuple[torch.Tensor, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A session as numbers: what another engine needs to continue it."""

    session_id: SessionId
    prompt_token_ids: tuple[int, ...]
    generated_token_ids: tuple[int, ...]
    sampling: Sampling
    kv: KvExport | None = None
    """Only when asked for; covers a prefix of prompt and generated tokens."""
    adapter: AdapterWeights | None = None
    """As in `Submit`; the KV was computed with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """Bounds of an engine. Whoever starts it chooses them; the context is also bounded by the model."""

    max_batch: int = 8
    """Sessions decoded in one step."""
    max_waiting: int = 64
    """Sessions accepted beyond the batch; more raise `QueueFull`."""
    max_context_tokens: int = 8192
    """Prompt and output of one session together."""
    max_kv_tokens: int = 32768
    """KV tokens of all sessions together; the youngest session is set back when they run out."""
    prefill_chunk_tokens: int = 256
    """Prompt tokens processed between two decode steps. Part of the numerics: all workers of a model must
    agree on it for bit-equal prefills."""


@dataclass(slots=True, kw_only=True)
class EngineStats:
    """What an engine is doing now, and what it has done since its start."""

    running: int = 0
    waiting: int = 0
    kv_tokens: int = 0
    """KV tokens allocated."""
    max_kv_tokens: int = 0
    preempted_count: int = 0
    """Sessions set back to the queue because KV tokens ran out."""
    prefill_token_count: int = 0
    """Prompt and re-prefilled tokens processed."""
    replay_token_count: int = 0
    """Tokens replayed through the decode path."""
    decode_token_count: int = 0
    """Tokens generated."""
    step_count: int = 0


class Engine(Protocol):
    """Runs one model for many sessions at a time."""

    @property
    def limits(self) -> EngineLimits:
        """Return the bounds in force, the model's context length taken into account."""
        ...

    @property
    def numerics(self) -> str:
        """Return what decides the bits of results here; see `numerics.numerics`."""
        ...

    def submit(self, request: Submit) -> None:
        """Queue a session; its first output comes from a later `step`. Any thread.

        Raises:
            InvalidRequest: No prompt, a token id outside the vocabulary, or a session id in use.
            ContextLengthExceeded: Prompt and `max_tokens` don't fit the context.
            QueueFull: Batch and queue are full.
        """
        ...

    def resume(self, snapshot: Snapshot, mode: ResumeMode = ResumeMode.EXACT) -> None:
        """Queue a session where a snapshot left it, using the snapshot's KV when there is some. Any thread.

        Raises:
            InvalidRequest, ContextLengthExceeded, QueueFull: As for `submit`.
        """
        ...

    def cancel(self, session_id: SessionId) -> None:
        """End a session: the next `step` gives its `Finished` and no token of it. Unknown ids are ignored."""
        ...

    def has_work(self) -> bool:
        """Say whether `step` would do anything. Any thread."""
        ...

    def held_seconds(self) -> float | None:
        """Return when there may be work again though nobody asks for it; None = never. Any thread."""
        ...

    def step(self) -> list[Output]:
        """Advance every session by at most one token; return what came of it, in order per session."""
        ...

    def snapshot(self, session_id: SessionId, *, with_kv: bool = False) -> Snapshot:
        """Return a session as it is between two steps.

        Raises:
            NotFound: No such session runs or waits here.
        """
        ...

    @property
    def kv_layout(self) -> KvLayout:
        """Return how keys and values leave and enter this engine."""
        ...

    def export_kv(self, session_id: SessionId) -> KvReader:
        """Return what reads a session's keys and values while it goes on; a session may have none yet.

        Raises:
            NotFound: No such session runs or waits here.
            KvUnavailable: They can't leave this engine, for a reason.
        """
        ...

    def take_kv(self, session_id: SessionId) -> StagedKv | None:
        """Take a session's keys and values from it, for another one; None = it has none. Cancel it next.

        Raises:
            NotFound: No such session runs or waits here.
        """
        ...

    def hold(self, session_id: SessionId, seconds: float) -> int:
        """Make no token of a session for so long; 0 lets it go on. Others are not affected.

        Returns:
            How many tokens it has, prompt and output.

        Raises:
            NotFound: No such session runs or waits here.
        """
        ...

    def warm_decode(self) -> None:
        """Have the first decode step behind it, which takes up to twice as long as others.

        Does nothing once there was one. Call it in the engine's thread.
        """
        ...

    def stage_kv(self) -> StagedKv:
        """Return room for keys and values of a session that is on its way; `extend` it first. Any thread.

        It counts like a session's own until the session that gets it ends, or it is released.
        """
        ...

    def stats(self) -> EngineStats:
        """Return what the engine is doing. Any thread."""
        ...

    def close(self) -> None:
        """Free KV and model. No call after this one."""
        ...
