"""Fault schedules: one stream on a toy cluster, all of its faults drawn from a seed, and what must hold."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields
from pathlib import Path

from services.gateway.job import Job
from services.gateway.routing.routes import RouteTable
from services.gateway.sampling import SamplingRequest
from services.gateway.sessions.hops import HopPolicy
from services.gateway.sessions.session_run import SessionRun
from services.gateway.text_request import Prompts, TextRequest
from services.gateway.trace import Trace
from stoker.v1 import controller_pb2, model_pb2
from tests.integration.streams.client import HastyClock, Seen
from tests.simulation.streams.toy_cluster import ToyCluster, ToyPlacement, toy_token
from tests.unit.services.gateway.builders import TOKENIZER, session

POLICY = HopPolicy(max_attempts=1_000, max_hops=1_000, resume_timeout_seconds=1e9)
FAULTS = (0.02, 0.05, 0.1, 0.2)
"""Probability of a fault at each event; during a move each of its phases is struck four times as often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """All that a run depends on."""

    seed: int
    nodes: int
    faults: float
    tokens: int = 24

    @classmethod
    def of(cls, seed: int) -> Schedule:
        """Return the schedule of a seed."""
        return cls(seed=seed, nodes=2 + seed % 3, faults=FAULTS[seed % len(FAULTS)])

    @classmethod
    def read(cls, path: Path) -> Schedule:
        """Return the schedule that a file holds: `name value` lines, `#` begins a comment."""
        lines = (line.partition("#")[0].split() for line in path.read_text().splitlines())
        told = dict(line for line in lines if line)
        return cls(
            seed=int(told["seed"]),
            nodes=int(told["nodes"]),
            faults=float(told["faults"]),
            tokens=int(told["tokens"]),
        )

    def write(self, folder: Path, outcome: Outcome) -> Path:
        """Write it as a file that the tests play from then on, with what went wrong as comments."""
        path = folder / f"seed-{self.seed}.schedule"
        lines = [f"{field.name} {getattr(self, field.name)}" for field in fields(self)]
        said = [f"# {outcome.wrong}", *(f"# {each}" for each in outcome.history)]
        path.write_text("\n".join([*lines, *said]) + "\n")
        return path


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What came of a schedule."""

    wrong: str
    """What does not hold; empty = everything does."""
    history: tuple[str, ...]
    hops: int
    moves: int


async def play(schedule: Schedule) -> Outcome:
    """Run a stream to its end under a schedule's faults and look whether anybody could tell."""
    seed = schedule.seed
    cluster = ToyCluster(seed, nodes=schedule.nodes, faults=schedule.faults)
    clock, seen, table = HastyClock(), Seen(), RouteTable()
    route = controller_pb2.Route(
        model=model_pb2.Model(spec=model_pb2.ModelSpec(name="tiny", checkpoint_uri="/m")),
        replicas=[controller_pb2.RouteReplica(replica_id=name, max_batch=4) for name in cluster.nodes],
    )
    table.apply(controller_pb2.RoutesUpdate(snapshot=True, routes=[route]))
    trace = Trace(
        request_id="r", model="tiny", kind="chat", started_seconds=clock.now_seconds(), unix_seconds=0
    )
    trace.first_token_seconds = 0.0  # its client has seen something: nothing but success will do
    request = TextRequest(
        request_id="r", model="tiny", content=Prompts(prompts=["x"]), sampling=SamplingRequest()
    )
    job = Job(request=request, trace=trace, sink=seen, clock=clock, timeout_seconds=1e12)
    stream = session(max_tokens=schedule.tokens, seed=seed)
    placement = ToyPlacement(table, clock, cluster)
    run = SessionRun(stream, 0, job, placement, cluster, POLICY)  # type: ignore[arg-type]
    await run.run(table.find("tiny").replicas[0])
    await asyncio.sleep(0)
    log: list[int] = []
    while len(log) < schedule.tokens:
        log.append(toy_token(stream.prompt_token_ids, seed, log))
    wrong = ""
    if seen.text != TOKENIZER.decode(log) or stream.token_ids != log:
        wrong = f"the client saw {seen.text!r}, without faults it is {TOKENIZER.decode(log)!r}"
    elif cluster.streams:
        wrong = f"{cluster.streams} calls are open"
    elif placement.in_flight:
        wrong = f"sessions are still counted: {dict(placement.in_flight)}"
    return Outcome(wrong=wrong, history=tuple(cluster.history), hops=trace.hops, moves=trace.moves)
