"""A session as the engine holds it: its tokens, how far the KV cache has them, and when it ends.

One rule covers prompts, decoding, exact resume and sessions that were set back: `tokens` (prompt and output)
below `prefill_tokens` enter the cache in prefill chunks; every later one as a row of a decode step. A session
that merely decodes has one such row per step, the token chosen last; one that is replayed has many, and only
the last of them is asked for logits.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from services.worker.engine.protocol import Finished, FinishReason, ResumeMode, SessionTimings, Snapshot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from services.worker.engine.adapted_rows import AdapterWeights
    from services.worker.engine.protocol import KvExport, Sampling, Submit
    from services.worker.engine.sampling import TokenChooser
    from services.worker.kv.kv_store import SessionKv
    from stoker.ids import SessionId


@dataclass(slots=True, kw_only=True)
class Session:
    """One session, from submit to finish. Belongs to the engine's thread once admitted."""

    session_id: SessionId
    sampling: Sampling
    prompt_token_count: int
    tokens: list[int]
    """Prompt, then output."""
    prefill_tokens: int
    """How many of `tokens` enter the cache by prefill: the prompt, or for fast resume all it came with."""
    max_output_tokens: int
    chooser: TokenChooser
    kv: SessionKv
    submitted_seconds: float
    adapter: AdapterWeights | None = None
    started_seconds: float | None = None
    first_token_seconds: float | None = None
    cached: int = 0
    """How many of `tokens` the KV cache has."""
    shipped_kv: KvExport | None = None
    """KV that came with a snapshot, until the session is admitted."""
    held_until_seconds: float = float("-inf")
    """On the engine's clock: it makes no token before."""
    emitted: int = field(default=0)
    """Tokens chosen here, that is without the resumed ones."""

    @property
    def generated_token_count(self) -> int:
        """Return how many output tokens there are, resumed ones included."""
        return len(self.tokens) - self.prompt_token_count

    @property
    def is_prefilling(self) -> bool:
        """Say whether part of the prefill is still to do."""
        return self.cached < self.prefill_tokens

    def ending(self) -> tuple[FinishReason, int | None] | None:
        """Return why the session is over, and by which stop token, if its tokens end it."""
        count = self.generated_token_count
        if count == 0:
            return None
        last = self.tokens[-1]
        if last in self.sampling.stop_token_ids and not self.sampling.ignore_eos:
            return FinishReason.STOP, last
        return (FinishReason.LENGTH, None) if count >= self.max_output_tokens else None

    def begin_at_known(self, chunk_tokens: int) -> None:
        """Go back to where the next token's computation begins as it would without what is known already.

        The last token is always fed: its logits choose the next one. A prefill goes on where a chunk begins.

        Args:
            chunk_tokens: Of a prefill chunk.
        """
        self.cached = min(self.cached, len(self.tokens) - 1)
        if self.is_prefilling:
            self.cached -= self.cached % chunk_tokens

    def set_back(self) -> None:
        """Forget the KV; the tokens will be computed again, to the same bits."""
        self.kv.release()
        self.cached = 0

    def finished(
        self, reason: FinishReason, now_seconds: float, *, stop_token_id: int | None = None, message: str = ""
    ) -> Finished:
        """Return the session's last message."""
        return Finished(
            session_id=self.session_id,
            reason=reason,
            prompt_token_count=self.prompt_token_count,
            generated_token_count=self.generated_token_count,
            stop_token_id=stop_token_id,
            timings=self.timings(now_seconds),
            message=message,
        )

    def timings(self, now_seconds: float) -> SessionTimings:
        """Return where the time went until now."""
        started = now_seconds if self.started_seconds is None else self.started_seconds
        first = now_seconds if self.first_token_seconds is None else self.first_token_seconds
        return SessionTimings(
            queue_seconds=started - self.submitted_seconds,
            prefill_seconds=first - started,
            decode_seconds=now_seconds - first,
        )

    def snapshot(self, *, with_kv: bool) -> Snapshot:
        """Return the session as numbers, with a copy of its KV if asked for and there is any."""
        return Snapshot(
            session_id=self.session_id,
            prompt_token_ids=tuple(self.tokens[: self.prompt_token_count]),
            generated_token_ids=tuple(self.tokens[self.prompt_token_count :]),
            sampling=self.sampling,
            kv=self.kv.export(self.cached) if with_kv and self.cached else None,
            adapter=self.adapter,
        )


def prefill_token_count(request: Submit) -> int:
    """Return how many tokens of a request enter the cache by prefill."""
    prompt: Sequence[int] = request.prompt_token_ids
    if request.resume_mode is ResumeMode.FAST:
        return len(prompt) + len(request.generated_token_ids)
    return len(prompt)
