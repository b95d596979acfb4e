"""Sessions over real engines without processes: the gateway's run, the wire's messages, the worker's engine.

Only the transport is simulated: what an agent and a worker would carry goes from one to the other in memory,
and a kill ends a replica's stream at a chosen token, in the middle of whatever its engine was doing.
"""

from __future__ import annotations

import random
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from services.gateway.job import Job
from services.gateway.routing.placement import Placement
from services.gateway.routing.routes import Replica, RouteTable
from services.gateway.sampling import SamplingRequest
from services.gateway.sessions.hops import HopPolicy
from services.gateway.sessions.session import Session
from services.gateway.sessions.session_run import SessionRun
from services.gateway.text.model_text import ModelText
from services.gateway.text_request import Prompts, TextRequest
from services.gateway.trace import Trace
from services.worker import wire
from services.worker.engine import protocol as tokens
from services.worker.engine.transformers_engine import TransformersEngine
from stoker.errors import WorkerDied
from stoker.ids import ReplicaId, SessionId
from stoker.v1 import controller_pb2, model_pb2, session_pb2
from tests.integration.streams.client import HastyClock, Seen
from tests.unit.services.worker.tiny_models import served

NewEngine = Callable[[], TransformersEngine]
LIMITS = tokens.EngineLimits(prefill_chunk_tokens=32, max_batch=4, max_waiting=8, max_kv_tokens=4096)
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")


def engine_model(folder: Path, dtype: torch.dtype) -> torch.nn.Module:
    """Return a checkpoint's model as a worker serves it."""
    return served(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval())


def text_of(folder: Path) -> ModelText:
    """Return a checkpoint's text side."""
    return ModelText({name: (folder / name).read_bytes() for name in TEXT_FILES if (folder / name).exists()})


class Replicas:
    """Replicas that die on schedule; stands where `Agents` does.

    Args:
        new_engine: Builds a replica's engine.
        kill_after: Tokens of the session after which the replica that gave the last one dies, ascending;
            0 = during its prefill.
        beside: Sessions that run in every replica's batch as well.
        drop_finish: The killed replica gave its last token without saying that it was the last.
    """

    def __init__(
        self,
        new_engine: Callable[[], TransformersEngine],
        kill_after: tuple[int, ...] = (),
        beside: tuple[tokens.Submit, ...] = (),
        *,
        drop_finish: bool = False,
    ) -> None:
        self._drop_finish = drop_finish
        self._new_engine = new_engine
        self._kills = list(kill_after)
        self._beside = beside
        self.orders: list[session_pb2.GenerateRequest] = []

    async def generate(
        self, replica: Replica, order: session_pb2.GenerateRequest, *, timeout_seconds: float
    ) -> AsyncGenerator[session_pb2.GenerateEvent]:
        """Yield a session's events until it ends or its replica is killed."""
        self.orders.append(order)
        engine = self._new_engine()
        try:
            for event in self._events(engine, order):
                yield event
        finally:
            engine.close()

    def _events(
        self, engine: TransformersEngine, order: session_pb2.GenerateRequest
    ) -> Iterator[session_pb2.GenerateEvent]:
        received = session_pb2.GenerateRequest.FromString(order.SerializeToString())
        engine_id = SessionId("mine")
        owners = {engine_id: wire.Owner(session_id=order.session_id, epoch=order.epoch)}
        rng = random.Random(order.epoch)
        beside = list(self._beside[: 1 + order.epoch % 3]) if self._beside else []
        for other in beside:
            engine.submit(other)
        for _ in range(rng.randrange(3) if beside else 0):
            engine.step()
        engine.submit(wire.submit(received, engine_id))
        count = len(order.generated_token_ids)
        while True:
            if self._kills and count >= self._kills[0]:
                self._kills.pop(0)
                engine.step()  # it had begun, or was a token ahead: what nobody has seen must not matter
                raise WorkerDied("killed")
            for item in wire.step_event(engine.step(), owners).sessions:
                event = session_pb2.GenerateEvent.FromString(item.event.SerializeToString())
                count += len(event.tokens)
                if self._drop_finish and self._kills:
                    event.finish_reason = session_pb2.FINISH_REASON_UNSPECIFIED
                yield event
                if event.finish_reason:
                    return


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came of a request, for comparison bit by bit."""

    text: str
    logprobs: tuple[Any, ...]
    finish_reason: str | None
    token_ids: tuple[int, ...]
    trace: Trace = field(compare=False)


async def answer(  # noqa: PLR0913 - a builder
    replicas: Replicas,
    text: ModelText,
    prompt: list[int],
    *,
    stop: tuple[str, ...] = (),
    policy: HopPolicy | None = None,
    resume: str = "exact",
    session_id: str = "ses-1",
    **sampling: Any,
) -> Answer:
    """Run one session to its end over the replicas."""
    clock, table, seen = HastyClock(), RouteTable(), Seen()
    table.apply(controller_pb2.RoutesUpdate(snapshot=True, routes=[_route(resume)]))
    trace = Trace(
        request_id="r", model="tiny", kind="completion", started_seconds=clock.now_seconds(), unix_seconds=0
    )
    request = TextRequest(
        request_id="r", model="tiny", content=Prompts(prompts=[prompt]), sampling=SamplingRequest()
    )
    job = Job(request=request, trace=trace, sink=seen, clock=clock, timeout_seconds=1e6)
    session = Session(
        session_id=SessionId(session_id),
        prompt_token_ids=prompt,
        sampling=session_pb2.Sampling(**({"seed": 11, "top_p": 1.0, "repetition_penalty": 1.0} | sampling)),
        text=text,
        stop=stop,
    )
    placement = Placement(table, None, clock=clock, cold_timeout_seconds=1, patience_seconds=1)  # type: ignore[arg-type]
    run = SessionRun(session, 0, job, placement, replicas, policy or HopPolicy(max_hops=1000))  # type: ignore[arg-type]
    first = table.find("tiny").replicas[0]
    await run.run(first)
    return Answer(
        text=seen.text,
        logprobs=tuple(seen.logprobs),
        finish_reason=seen.finish_reason,
        token_ids=tuple(session.token_ids),
        trace=trace,
    )


def _route(resume: str) -> controller_pb2.Route:
    return controller_pb2.Route(
        model=model_pb2.Model(spec=model_pb2.ModelSpec(name="tiny", checkpoint_uri="/m", resume=resume)),
        replicas=[
            controller_pb2.RouteReplica(replica_id=ReplicaId(f"rep-{number}"), node_id="n", max_batch=4)
            for number in range(100)
        ],
    )
