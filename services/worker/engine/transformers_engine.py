"""The engine over transformers' models: continuous batching in a step loop of our own.

Theory of operation. A step: cancel what was asked to, admit waiting sessions while batch and KV have room,
run one decode pass for all sessions that have tokens to feed, then prefill chunks up to
`prefill_chunk_tokens`.
The arithmetic of a session never depends on the others:

- prefill cuts a prompt into chunks that begin at multiples of `prefill_chunk_tokens`, whoever else is there;
- tokens of several sessions are packed into the rows of one pass; matrix products are made of groups of equal
  row count (`row_linear`), attention goes session by session (`attention`), everything else is per row;
- sampling takes one row at a time (`sampling`).

Replay and decoding are one path (`session`): a session that resumes feeds its generated tokens as rows of
decode passes, several at a time, since rows don't influence each other's bits except through the KV cache.

When KV tokens run out, the session admitted last is set back to the queue; it is computed again, exactly.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from services.worker.engine.forward import Chunk, ModelRunner
from services.worker.engine.numerics import numerics
from services.worker.engine.protocol import (
    EngineLimits,
    EngineStats,
    Finished,
    FinishReason,
    ResumeMode,
    Sampling,
    Snapshot,
    Submit,
)
from services.worker.engine.requests import accepted
from services.worker.engine.sampling import TokenChooser
from services.worker.engine.session_passes import SessionPasses
from services.worker.kv.kv_exchange import KvReader, StagedKv, layout_of
from services.worker.kv.kv_store import SLOT_TOKENS, KvBudget, SessionKv
from services.worker.weights.weights_gate import PassInterrupted
from stoker.errors import InvalidRequest, KvUnavailable, NotFound, QueueFull

if TYPE_CHECKING:
    from collections.abc import Callable

    from services.worker.engine.protocol import KvExport, Output
    from services.worker.engine.session import Session
    from services.worker.kv.kv_format import KvLayout
    from stoker.ids import SessionId

ENGINE = "transformers"


class TransformersEngine:
    """An `Engine` over one transformers causal language model.

    Args:
        model: Built by `model_loading`, weights assigned, in eval mode, on its device.
        limits: Bounds; the context is lowered to what the model and the KV budget allow.
        group_rows: Rows per matrix product in decode passes; None: the measured best for dtype and device.
            Part of the numerics: all workers of a model must agree on it.
        clock: Seconds, monotonic.
        revision: Of the model's checkpoint: keys and values are exchanged between equal ones only.
        runner: Of the model, if one is made already; `group_rows` is its own then.
    """

    def __init__(  # noqa: PLR0913 - what an engine is made of
        self,
        model: torch.nn.Module,
        limits: EngineLimits,
        *,
        group_rows: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        revision: str = "",
        runner: ModelRunner | None = None,
    ) -> None:
        self._runner = runner or ModelRunner(model, group_rows)
        self._kv_layout = layout_of(
            model.config,
            self._runner.dtype,
            engine="transformers",
            revision=revision,
            ranks=self._runner.ranks,
        )
        context = min(limits.max_context_tokens, self._runner.max_context_tokens, limits.max_kv_tokens)
        self._limits = replace(limits, max_context_tokens=context)
        # The longest session fits beside the pool.
        slots = min(limits.max_batch, (limits.max_kv_tokens - context) // SLOT_TOKENS)
        slots = slots if self._runner.device.type == "cpu" else 0
        longest = min(context, limits.max_kv_tokens - slots * SLOT_TOKENS)
        self._budget = KvBudget(limits.max_kv_tokens, slots, longest)
        self._clock = clock
        self._lock = threading.Lock()
        self._waiting: deque[Session] = deque()
        self._running: list[Session] = []
        self._live: dict[SessionId, Session] = {}
        self._cancelled: set[SessionId] = set()
        self._is_warm = False
        self._stats = EngineStats(max_kv_tokens=limits.max_kv_tokens)
        self._passes = SessionPasses(
            self._runner,
            self._stats,
            prefill_chunk_tokens=limits.prefill_chunk_tokens,
            clock=clock,
            finish=self._finish,
        )

    @property
    def limits(self) -> EngineLimits:
        """See `Engine`."""
        return self._limits

    @property
    def numerics(self) -> str:
        """See `Engine`."""
        return numerics(
            engine=ENGINE,
            dtype=self._runner.dtype,
            device=self._runner.device,
            group_rows=self._runner.group_rows,
            prefill_group_rows=self._runner.prefill_group_rows,
            prefill_chunk_tokens=self._limits.prefill_chunk_tokens,
            ranks=self._runner.ranks,
        )

    @property
    def kv_budget(self) -> KvBudget:
        """Return what counts the keys and values of this engine's sessions."""
        return self._budget

    def first_pass(self) -> None:
        """Run one token through the model, before any session: touches all weights, proves the layers' fit.

        Raises:
            CheckpointInvalid: Some layers don't keep keys and values the way this engine serves.
            LogitsNotFinite: The weights give NaN or infinity.
        """
        probe = SessionKv(KvBudget(1))
        probe.reserve(1)
        with torch.inference_mode():
            logits = self._runner.prefill([Chunk(kv=probe, start=0, tokens=[0], needs_logits=True)])[0]
        if logits is not None:
            TokenChooser(Sampling(), [0], [], self._runner.vocab_size).choose(logits, 0)

    def warm_decode(self) -> None:
        """See `Engine`."""
        if self._is_warm or self._stats.decode_token_count:
            return
        probe = SessionKv(KvBudget(1))
        probe.reserve(1)
        with suppress(PassInterrupted), torch.inference_mode():  # weights are missing: it stays cold
            self._runner.decode([(probe, 0, 0)], [0], [None])
            self._is_warm = True

    def submit(self, request: Submit) -> None:
        """See `Engine`."""
        self._enqueue(request, None)

    def resume(self, snapshot: Snapshot, mode: ResumeMode = ResumeMode.EXACT) -> None:
        """See `Engine`."""
        request = Submit(
            session_id=snapshot.session_id,
            prompt_token_ids=snapshot.prompt_token_ids,
            generated_token_ids=snapshot.generated_token_ids,
            resume_mode=mode,
            sampling=snapshot.sampling,
            adapter=snapshot.adapter,
        )
        self._enqueue(request, snapshot.kv)

    def cancel(self, session_id: SessionId) -> None:
        """See `Engine`."""
        with self._lock:
            if session_id in self._live:
                self._cancelled.add(session_id)

    def has_work(self) -> bool:
        """See `Engine`."""
        with self._lock:
            if self._cancelled:
                return True
            now_seconds = self._clock()
            return any(session.held_until_seconds <= now_seconds for session in self._live.values())

    def held_seconds(self) -> float | None:
        """See `Engine`."""
        with self._lock:
            ends = [session.held_until_seconds for session in self._live.values()]
        return max(0.0, min(ends) - self._clock()) if ends else None

    def step(self) -> list[Output]:
        """See `Engine`."""
        outputs: list[Output] = []
        self._cancel(outputs)
        with torch.inference_mode():  # shipped keys and values are written into stores that passes made
            self._admit(outputs)
        now_seconds = self._clock()
        decoding = self._with_room(
            [
                session
                for session in self._running
                if not session.is_prefilling and session.held_until_seconds <= now_seconds
            ]
        )
        with suppress(PassInterrupted), torch.inference_mode():  # what was given up, a later step does again
            self._passes.decode(decoding, outputs)
            self._passes.prefill(self._running, outputs)
        self._stats.step_count += 1
        return outputs

    def snapshot(self, session_id: SessionId, *, with_kv: bool = False) -> Snapshot:
        """See `Engine`."""
        session = self._live.get(session_id)
        if session is None:
            raise NotFound(f"session {session_id} does not run or wait in this engine")
        return session.snapshot(with_kv=with_kv)

    @property
    def kv_layout(self) -> KvLayout:
        """See `Engine`."""
        return self._kv_layout

    def export_kv(self, session_id: SessionId) -> KvReader:
        """See `Engine`."""
        session = self._live.get(session_id)
        if session is None:
            raise NotFound(f"session {session_id} does not run or wait in this engine")
        if not session.cached:
            raise KvUnavailable(f"session {session_id} has no keys and values yet")
        adapter = ("", "") if session.adapter is None else session.adapter.identity
        return KvReader(session.kv, self._kv_layout, session.tokens[: session.cached], adapter)

    def take_kv(self, session_id: SessionId) -> StagedKv | None:
        """See `Engine`."""
        session = self._live.get(session_id)
        if session is None:
            raise NotFound(f"session {session_id} does not run or wait in this engine")
        if not session.cached:
            return None
        staged = StagedKv(session.kv, self._kv_layout, self._runner.device)
        staged.tokens = session.cached
        session.kv, session.cached = SessionKv(self._budget), 0
        return staged

    def hold(self, session_id: SessionId, seconds: float) -> int:
        """See `Engine`. A session that is still in its prefill is not held."""
        session = self._live.get(session_id)
        if session is None:
            raise NotFound(f"session {session_id} does not run or wait in this engine")
        is_held = seconds > 0 and not session.is_prefilling
        session.held_until_seconds = self._clock() + seconds if is_held else float("-inf")
        return len(session.tokens)

    def stage_kv(self) -> StagedKv:
        """See `Engine`."""
        return StagedKv(SessionKv(self._budget), self._kv_layout, self._runner.device)

    def stats(self) -> EngineStats:
        """See `Engine`."""
        running = len(self._running)
        return replace(
            self._stats,
            running=running,
            waiting=max(0, len(self._live) - running),
            kv_tokens=self._budget.used_tokens,
        )

    def close(self) -> None:
        """See `Engine`."""
        with self._lock:
            for session in self._live.values():
                session.kv.release()
            self._live.clear()
            self._waiting.clear()
        self._running.clear()
        self._runner.close()

    # --- queueing ------------------------------------------------------------------------------------------

    def _enqueue(self, request: Submit, kv: KvExport | None) -> None:
        session = accepted(
            request,
            kv,
            vocab_size=self._runner.vocab_size,
            context_tokens=self._limits.max_context_tokens,
            budget=self._budget,
            now_seconds=self._clock(),
        )
        limits = self._limits
        with self._lock:
            if session.session_id in self._live:
                raise InvalidRequest(f"session {session.session_id} is already running here")
            if len(self._live) >= limits.max_batch + limits.max_waiting:
                raise QueueFull(
                    f"the worker has {len(self._live)} sessions, its limit; try again or another replica",
                    retry_after_seconds=1.0,
                )
            self._live[session.session_id] = session
            self._waiting.append(session)

    def _cancel(self, outputs: list[Output]) -> None:
        with self._lock:
            cancelled = [self._live[key] for key in self._cancelled if key in self._live]
            self._cancelled.clear()
        for session in cancelled:
            self._finish(session, session.finished(FinishReason.CANCELLED, self._clock()), outputs)

    def _admit(self, outputs: list[Output]) -> None:
        """Move sessions from the queue into the batch while there is room, in order of arrival."""
        while self._waiting and len(self._running) < self._limits.max_batch:
            session = self._waiting[0]
            if (end := session.ending()) is not None:  # it came complete: only its end was missing
                ended = session.finished(end[0], self._clock(), stop_token_id=end[1])
                self._finish(session, ended, outputs)
                continue
            while not session.kv.reserve(len(session.tokens)):
                if not self._take_back_room(session):
                    return
            with self._lock:
                self._waiting.popleft()
            self._running.append(session)
            if session.started_seconds is None:
                session.started_seconds = self._clock()
            if session.shipped_kv is not None:
                session.cached = session.shipped_kv.token_count
                session.kv.load(session.shipped_kv, session.cached, self._runner.device)
                session.shipped_kv = None
            session.begin_at_known(self._limits.prefill_chunk_tokens)

    def _with_room(self, decoding: list[Session]) -> list[Session]:
        """Reserve KV for this pass's rows, setting back the youngest sessions while there is none."""
        for session in list(decoding):
            while session in self._running and not session.kv.reserve(len(session.tokens)):
                if self._take_back_room(session):
                    continue
                youngest = self._running.pop()
                youngest.set_back()
                with self._lock:
                    self._waiting.appendleft(youngest)
                self._stats.preempted_count += 1
        return [session for session in decoding if session in self._running]

    def _take_back_room(self, needy: Session) -> bool:
        """Take the room of a waiting session that came with keys and values; False if there is none."""
        with self._lock:
            holding = [session for session in self._waiting if session.cached and session is not needy]
        if holding:
            holding[-1].set_back()
        return bool(holding)

    def _finish(self, session: Session, finished: Finished, outputs: list[Output]) -> None:
        session.kv.release()
        if session in self._running:
            self._running.remove(session)
        with self._lock:
            del self._live[session.session_id]
            if session in self._waiting:
                self._waiting.remove(session)
        outputs.append(finished)
