"""A step's forward passes: which rows and chunks the batch's sessions feed, and the tokens chosen after."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from services.worker.engine.forward import Chunk
from services.worker.engine.protocol import FinishReason, TokenOut
from services.worker.engine.sampling import LogitsNotFinite, log_probabilities

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from services.worker.engine.forward import ModelRunner
    from services.worker.engine.protocol import EngineStats, Finished, Output
    from services.worker.engine.sampling import Floats
    from services.worker.engine.session import Session

    Finish = Callable[[Session, Finished, list[Output]], None]

REPLAY_ROWS = 12
"""Tokens of one resuming session fed in one decode pass; bounds what a replay adds to the others' steps."""


class SessionPasses:
    """Runs passes for sessions that have room for them. Belongs to the engine's thread.

    Args:
        runner: Of the model.
        stats: Counted here: tokens.
        prefill_chunk_tokens: Of a prefill chunk, and of all chunks of a step together.
        clock: Seconds, monotonic.
        finish: Ends a session whose last token was chosen, or can't be.
    """

    def __init__(
        self,
        runner: ModelRunner,
        stats: EngineStats,
        *,
        prefill_chunk_tokens: int,
        clock: Callable[[], float],
        finish: Finish,
    ) -> None:
        self._runner = runner
        self._stats = stats
        self._chunk_tokens = prefill_chunk_tokens
        self._clock = clock
        self._finish = finish

    def decode(self, sessions: Sequence[Session], outputs: list[Output]) -> None:
        """Feed each session's next tokens; choose for those whose last token was fed."""
        rows: list[tuple[Session, int]] = []
        for session in sessions:
            end = min(len(session.tokens), session.cached + REPLAY_ROWS)
            rows.extend((session, index) for index in range(session.cached, end))
        for part in self._runner.passes(rows):
            logits = self._runner.decode(
                [(s.kv, index, s.tokens[index]) for s, index in part],
                [row for row, (s, index) in enumerate(part) if index == len(s.tokens) - 1],
                [s.adapter for s, _ in part],
            )
            complete = [s for s, index in part if index == len(s.tokens) - 1]
            for session, index in part:
                session.cached = index + 1
                if index < len(session.tokens) - 1:
                    self._stats.replay_token_count += 1
            for session, row in zip(complete, logits, strict=True):
                self._choose(session, row, outputs)

    def prefill(self, running: Sequence[Session], outputs: list[Output]) -> None:
        """Run prefill chunks, in order of arrival, until a step's worth of tokens is done."""
        planned = self._next_chunks(running)
        together = len(planned) if self._runner.packs_prefill else 1
        for first in range(0, len(planned), together or 1):
            part = planned[first : first + together]
            all_logits = self._runner.prefill([chunk for _, chunk in part])
            for (session, chunk), logits in zip(part, all_logits, strict=True):
                session.cached = chunk.start + len(chunk.tokens)
                self._stats.prefill_token_count += len(chunk.tokens)
                if logits is not None:
                    self._choose(session, logits, outputs)

    def _next_chunks(self, running: Sequence[Session]) -> list[tuple[Session, Chunk]]:
        """Return the next chunk of each session that is prefilling, as far as a step's tokens reach."""
        size = left = self._chunk_tokens
        planned: list[tuple[Session, Chunk]] = []
        for session in running:
            if not session.is_prefilling:
                continue
            end = min(session.cached - session.cached % size + size, session.prefill_tokens)
            left -= end - session.cached
            if left < 0:
                break
            tokens = session.tokens[session.cached : end]
            chunk = Chunk(
                kv=session.kv,
                start=session.cached,
                tokens=tokens,
                needs_logits=end == len(session.tokens),
                adapter=session.adapter,
            )
            planned.append((session, chunk))
        return planned

    def _choose(self, session: Session, logits: Floats, outputs: list[Output]) -> None:
        """Choose a session's next token from its row of logits; emit it, and the end if it is one."""
        position, sampling = session.generated_token_count, session.sampling
        try:
            token = session.chooser.choose(logits, position)
        except LogitsNotFinite as error:
            failed = session.finished(FinishReason.ERROR, self._clock(), message=error.message)
            self._finish(session, failed, outputs)
            return
        session.chooser.observe(token)
        session.tokens.append(token)
        self._stats.decode_token_count += 1
        out = TokenOut(session_id=session.session_id, position=position, token_id=token)
        if sampling.top_logprobs is not None:
            logprob, top = log_probabilities(logits, token, sampling.top_logprobs)
            out = replace(out, logprob=logprob, top_logprobs=top)
        if session.first_token_seconds is None:
            session.first_token_seconds = self._clock()
            out = replace(out, timings=session.timings(session.first_token_seconds))
        outputs.append(out)
        if (end := session.ending()) is not None:
            ended = session.finished(end[0], self._clock(), stop_token_id=end[1])
            self._finish(session, ended, outputs)
