"""The runner: takes a request from its text to the last token of its answers. A shell over the pure parts.

    route → admission → (cold: acquire ‖ tokenizer) → prompts → one session per answer → sink

The runner pushes into a `Sink`; cancelling the task that runs it cancels the generation, never a load. A
session whose replica fails goes on elsewhere (`session_run`, `hops`).
"""

from __future__ import annotations

import asyncio
import secrets
from concurrent.futures import Executor

from services.gateway import metrics
from services.gateway.job import Job
from services.gateway.prompts import content_characters, encode_prompts
from services.gateway.routing.admission import Admission
from services.gateway.routing.agents import Agents
from services.gateway.routing.placement import Placement
from services.gateway.routing.route_watch import RouteWatch
from services.gateway.routing.routes import ModelRoute, Replica, split_name
from services.gateway.sampling import derive_seed, output_budget, resolve
from services.gateway.sessions.hops import HopPolicy
from services.gateway.sessions.reattachment import Reattachment
from services.gateway.sessions.session import LENGTH, STOP, Session
from services.gateway.sessions.session_run import SessionRun
from services.gateway.small_files import ModelTexts
from services.gateway.text.model_text import ModelText
from services.gateway.text_request import Sink, TextRequest
from services.gateway.trace import Trace, Traces
from stoker import log
from stoker.clock import Clock
from stoker.errors import CapacityError, DeadlineExceeded, StokerError
from stoker.ids import SessionId, new_id
from stoker.v1 import model_pb2

INLINE_CHARACTERS = 4096
"""Shorter contents are encoded in the event loop (well below 1 ms); a thread's hop would cost more."""

UNLIMITED_TOKENS = 2**31 - 1
"""Output budget where nobody knows the context: the worker ends the answer at the model's limit."""

SEED_BITS = 64
DRAIN_RETRY_SECONDS = 1.0


class Runner:
    """Runs requests; see the module's docstring for the order of things.

    Args:
        watch: Routes.
        placement: Finds replicas.
        agents: Node agents.
        texts: Text sides of models.
        traces: Where traces are kept.
        executor: Threads for long texts.
        clock: Time.
        timeout_seconds: Longest life of a request.
        hop_policy: How long sessions look for another replica after a failure.
        reattach_seconds: How long sessions with a key go on without a gateway.
    """

    def __init__(  # noqa: PLR0913 - the parts it joins
        self,
        *,
        watch: RouteWatch,
        placement: Placement,
        agents: Agents,
        texts: ModelTexts,
        traces: Traces,
        executor: Executor,
        clock: Clock,
        timeout_seconds: float,
        hop_policy: HopPolicy,
        reattach_seconds: float,
    ) -> None:
        self._watch = watch
        self._placement = placement
        self._agents = agents
        self._texts = texts
        self._traces = traces
        self._executor = executor
        self._clock = clock
        self._timeout_seconds = timeout_seconds
        self._hop_policy = hop_policy
        self._reattach_seconds = reattach_seconds
        self._reattachment = Reattachment(agents)
        self._admission = Admission()
        self._running = 0
        self._idle = asyncio.Event()
        self._idle.set()
        self._draining = False

    def start_trace(self, request: TextRequest) -> Trace:
        """Return the request's trace, kept from now on."""
        model, adapter = split_name(request.model)
        trace = Trace(
            request_id=request.request_id,
            model=model,
            adapter=adapter or "",
            kind=request.kind,
            started_seconds=self._clock.now_seconds(),
            unix_seconds=self._clock.unix_seconds(),
            choices=request.sessions,
        )
        self._traces.add(trace)
        return trace

    async def run(self, request: TextRequest, trace: Trace, sink: Sink) -> None:
        """Answer a request; returns when all its answers have ended.

        Raises:
            StokerError: Why it could not be answered, or not to the end.
        """
        if self._draining:
            raise CapacityError(
                "this gateway is shutting down; send the request again",
                retry_after_seconds=DRAIN_RETRY_SECONDS,
            )
        job = Job(
            request=request,
            trace=trace,
            sink=sink,
            clock=self._clock,
            timeout_seconds=self._timeout_seconds,
        )
        self._running += 1
        self._idle.clear()
        try:
            await self._answer(job)
        except asyncio.CancelledError:
            trace.finish = "cancelled"
            raise
        except StokerError as error:
            trace.finish = error.code
            raise
        finally:
            trace.total_seconds = job.age_seconds()
            _report(trace, known=trace.model in self._watch.table)
            self._running -= 1
            if not self._running:
                self._idle.set()

    async def drain(self, grace_seconds: float) -> None:
        """Return when no request runs, after `grace_seconds` at the latest."""
        try:
            async with asyncio.timeout(grace_seconds):
                await self._idle.wait()
        except TimeoutError:
            log.get().warning("requests.abandoned", requests=self._running, after_seconds=grace_seconds)

    def refuse_new(self) -> None:
        """Refuse requests from now on."""
        self._draining = True

    async def _answer(self, job: Job) -> None:
        route = await self._watch.find(job.request.model)
        job.trace.route_seconds = job.age_seconds()
        count = job.request.sessions
        self._admission.enter(route, count)
        waiting = metrics.WAITING.labels(route.name)
        waiting.inc(count)  # each session's run takes itself off
        try:
            try:
                sessions, places = await self._prepare(job, route)
            except BaseException:
                waiting.dec(count)
                raise
            await self._run_sessions(job, sessions, places)
        finally:
            self._admission.leave(route.name, count)

    async def _prepare(self, job: Job, route: ModelRoute) -> tuple[list[Session], list[Replica]]:
        """Get the prompts' tokens and a replica for each; what can't be served is refused before a start."""
        text = self._texts.cached(route)
        replica = self._placement.ready(route)
        prompts = await self._encode(job, route, text) if text is not None else None
        if text is None:
            self._texts.prefetch(route)  # while the replica starts
        if replica is None:
            replica = await self._placement.acquire(job)
        if text is None or prompts is None:
            text = await self._fetch_text(job)
            prompts = await self._encode(job, route, text)
        job.trace.prompt_tokens = sum(map(len, prompts))
        adapter = route.adapters.get(job.trace.adapter)
        sessions = self._sessions(job.request, text, prompts, _context_tokens(route, replica), adapter)
        key = job.request.key
        if key is None:
            return sessions, [replica] * len(sessions)
        route = self._watch.table.find(job.trace.model)  # as of now, with what has become ready
        job.trace.revision = route.revision
        return sessions, await self._reattachment.restore(job, key, sessions, route, replica)

    async def _fetch_text(self, job: Job) -> ModelText:
        began_seconds = self._clock.now_seconds()
        route = self._watch.table.find(job.trace.model)  # by now it may name a store
        try:
            async with asyncio.timeout(job.left_seconds()):
                return await self._texts.get(route)
        except TimeoutError as error:
            raise DeadlineExceeded(f"the tokenizer of model {route.name!r} did not come in time") from error
        finally:
            job.trace.files_seconds = self._clock.now_seconds() - began_seconds

    async def _encode(self, job: Job, route: ModelRoute, text: ModelText) -> list[list[int]]:
        began_seconds = self._clock.now_seconds()
        request = job.request
        if content_characters(request) <= INLINE_CHARACTERS:
            prompts = encode_prompts(request, text, route.vocabulary_tokens)
        else:
            prompts = await asyncio.get_running_loop().run_in_executor(
                self._executor, encode_prompts, request, text, route.vocabulary_tokens
            )
        job.trace.text_seconds = self._clock.now_seconds() - began_seconds
        for prompt in prompts:
            output_budget(len(prompt), request.sampling.max_tokens, route.context_tokens)
        return prompts

    def _sessions(
        self,
        request: TextRequest,
        text: ModelText,
        prompts: list[list[int]],
        context_tokens: int,
        adapter: model_pb2.AdapterSpec | None,
    ) -> list[Session]:
        asked = request.sampling
        key = request.key
        seed = asked.seed if asked.seed is not None else key.seed if key else secrets.randbits(SEED_BITS)
        return [
            Session(
                session_id=key.session_id(number) if key else SessionId(new_id("ses")),
                prompt_token_ids=prompt,
                sampling=resolve(
                    asked,
                    text.defaults,
                    model_stop_ids=text.stop_token_ids,
                    seed=derive_seed(seed, number % request.choices),
                    max_tokens=output_budget(len(prompt), asked.max_tokens, context_tokens)
                    or UNLIMITED_TOKENS,
                ),
                text=text,
                stop=asked.stop,
                adapter=adapter,
                keep_seconds=self._reattach_seconds if key else 0.0,
                fingerprint=key.fingerprint if key else b"",
            )
            for number, prompt in enumerate(prompt for prompt in prompts for _ in range(request.choices))
        ]

    async def _run_sessions(self, job: Job, sessions: list[Session], places: list[Replica]) -> None:
        runs = [
            SessionRun(session, choice, job, self._placement, self._agents, self._hop_policy)
            for choice, session in enumerate(sessions)
        ]
        try:
            if len(runs) == 1:
                await runs[0].run(places[0])
                return
            async with asyncio.TaskGroup() as group:
                for run, replica in zip(runs, places, strict=True):
                    group.create_task(run.run(replica))
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from errors  # one failed; the others were cancelled for it
        finally:
            job.trace.completion_tokens = sum(len(session.token_ids) for session in sessions)
            reasons = {session.finish_reason for session in sessions}
            job.trace.finish = LENGTH if reasons == {LENGTH} else STOP


def _context_tokens(route: ModelRoute, replica: Replica) -> int:
    known = [limit for limit in (route.context_tokens, replica.max_context_tokens) if limit]
    return min(known, default=0)


def _report(trace: Trace, *, known: bool) -> None:
    """Count a finished request and write its canonical line."""
    model = trace.model if known else "unknown"  # clients must not make labels
    metrics.REQUESTS.labels(model, trace.kind, trace.finish).inc()
    if trace.first_token_seconds is not None:
        metrics.FIRST_TOKEN_SECONDS.labels(model).observe(trace.first_token_seconds)
        metrics.PROMPT_TOKENS.labels(model).inc(trace.prompt_tokens)
    if trace.finish in (STOP, LENGTH) and trace.total_seconds is not None:
        metrics.REQUEST_SECONDS.labels(model).observe(trace.total_seconds)
    if trace.acquire_seconds:
        metrics.ACQUIRE_SECONDS.labels(model).observe(trace.acquire_seconds)
    if trace.start is not None:
        metrics.observe_start(trace.start)
    log.get().info("request.finished", **trace.to_json())
