"""Fault schedules: one stream on a toy cluster, all of its faults drawn from a seed, and what must hold."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, fields
from pathlib import Path

from tests.simulation.streams.toy_cluster import ToyCluster, toy_token
from tests.simulation.streams.toy_gateway import ToyClient, ToyGateway
from tests.unit.services.gateway.builders import TOKENIZER

FAULTS = (0.02, 0.05, 0.1, 0.2)
"""Probability of a fault at each event; during a move each of its phases is struck four times as often."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """All that a run depends on."""

    seed: int
    nodes: int
    faults: float
    tokens: int = 24
    gateways: int = 1
    """Through which its client gets the answer; all but the last die, or are paused and wake, meanwhile."""

    @classmethod
    def of(cls, seed: int) -> Schedule:
        """Return the schedule of a seed."""
        return cls(
            seed=seed,
            nodes=2 + seed % 3,
            faults=FAULTS[seed % len(FAULTS)],
            gateways=(1, 1, 2, 1, 1, 3)[seed % 6],
        )

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
            gateways=int(told.get("gateways", 1)),
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
    gateways: int
    """That had to do with it."""
    found_tokens: int
    """That a gateway did not have to have made again."""


async def play(schedule: Schedule) -> Outcome:
    """Run a stream to its end under a schedule's faults and look whether anybody could tell."""
    cluster = ToyCluster(
        schedule.seed,
        nodes=schedule.nodes,
        faults=schedule.faults,
        leader_changes=schedule.gateways > 1,
    )
    client = ToyClient()
    gateways: list[ToyGateway] = []
    for number in range(schedule.gateways):
        gateway = ToyGateway(
            cluster,
            client,
            number=number,
            count=schedule.gateways,
            seed=schedule.seed,
            tokens=schedule.tokens,
        )
        gateways.append(gateway)
        await gateway.serve()
        if client.has_end or gateway.error:
            break
    for gateway in gateways:
        await gateway.end()
    await asyncio.sleep(0)
    log: list[int] = []
    while len(log) < schedule.tokens:
        log.append(toy_token(gateways[-1].session.prompt_token_ids, schedule.seed, log))
    return Outcome(
        wrong=_wrong(client, cluster, gateways, log),
        history=tuple(cluster.history),
        hops=sum(gateway.trace.hops for gateway in gateways),
        moves=sum(gateway.trace.moves for gateway in gateways),
        gateways=len(gateways),
        found_tokens=sum(gateway.found_tokens for gateway in gateways),
    )


def _wrong(client: ToyClient, cluster: ToyCluster, gateways: list[ToyGateway], log: list[int]) -> str:
    if gateways[-1].error:
        return f"its gateway ended it with {gateways[-1].error}"
    if client.text != TOKENIZER.decode(log) or gateways[-1].session.token_ids != log:
        return f"the client saw {client.text!r}, without faults it is {TOKENIZER.decode(log)!r}"
    if cluster.breaches:
        return cluster.breaches[0]
    if cluster.streams:
        return f"{cluster.streams} calls are open"
    for gateway in gateways:
        if gateway.placement.in_flight:
            return f"sessions are still counted: {dict(gateway.placement.in_flight)}"
    return ""
