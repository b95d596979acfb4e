"""A storm: fault-free answers first, then load and faults together, then the account."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from stoker.errors import StokerError
from stoker.v1 import model_pb2
from tests.chaos import leaks
from tests.chaos.asks import MODEL, Answer, Ask, asks
from tests.chaos.cluster import ChaosCluster, chaos_cluster, until
from tests.chaos.faults import KINDS, Fault, Faults, schedule
from tests.chaos.load import Clients, Tally, keep_asking
from tests.chaos.rolling import roll

REFERENCE_CLIENTS = 8
ROLL_SECONDS = 300.0
"""How long the services may take to be replaced, each, on average: a loaded machine starts workers slowly."""
CALM_SECONDS = 180.0
"""How long streams may need to end, and the cluster to be whole, after the last fault."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Weather:
    """What a storm is like."""

    seconds: float = 600.0
    """Load and faults together."""
    streams: int = 64
    """Requests open at a time."""
    rest_seconds: float = 0.0
    """Of a client between two requests: a machine that does other things, too, wants some."""
    nodes: int = 4
    every_seconds: float = 3.0
    """Between two faults, in the mean."""
    seed: int = 1
    """Of requests and faults."""
    requests: int = 32
    """Distinct ones."""
    tokens: int = 120
    """Of an answer, at most."""
    kinds: tuple[str, ...] = tuple(KINDS)
    """Of faults; none = only load for the time."""
    rolling: bool = False
    """After the faults every service is replaced in turn, once, however long that takes."""
    one_of_each: bool = False
    """Of the services that are replaced: one of each kind instead of all."""


@dataclass(slots=True)
class Account:
    """What a storm came to."""

    tally: Tally = field(default_factory=Tally)
    faults: Counter[str] = field(default_factory=Counter)
    broken: list[str] = field(default_factory=list)
    """Faults after which the cluster was not whole again."""
    leaked: list[str] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def is_good(self) -> bool:
        """Say whether nothing was lost, changed, broken or leaked."""
        return not (self.tally.lost or self.tally.changed or self.broken or self.leaked)


async def brew(weather: Weather, model_dir: Path, data_dir: Path, say: Callable[[str], None]) -> Account:
    """Run a storm on a cluster of its own and return the account.

    Args:
        weather: What it is like.
        model_dir: Folder of the checkpoint to serve.
        data_dir: Empty, its path short.
        say: Told what happens, for people.
    """
    account = Account()
    async with chaos_cluster(data_dir, node_count=weather.nodes, devices=2) as cluster:
        before = await _settled(cluster)
        await _deploy(cluster, model_dir, weather)
        processes = cluster.everything()
        wanted = await _fault_free(cluster, weather, say)
        began = time.monotonic()
        await _storm(cluster, weather, wanted, account, say)
        account.seconds = time.monotonic() - began
        say(f"after {account.seconds:.0f} s: {account.tally.line()}")
        await cluster.until_open()
        account.leaked += (await leaks.find_leaks(cluster, before, str(model_dir))).found
        processes += cluster.everything()
    found = await leaks.find_remains(processes, cluster.state_path, data_dir)
    account.leaked += found.found
    return account


async def _settled(cluster: ChaosCluster) -> leaks.Baseline:
    """Return what the cluster has once every node has its pre-started worker."""

    async def is_warm() -> bool:
        async with cluster.client() as client:
            return all(node.report.warm_workers for node in await client.nodes())

    await until(is_warm, "every node has a worker without a model")
    return await leaks.measure(cluster)


async def _deploy(cluster: ChaosCluster, model_dir: Path, weather: Weather) -> None:
    spec = model_pb2.ModelSpec(
        name=MODEL,
        checkpoint_uri=str(model_dir),
        keep_alive_seconds=-1,
        min_replicas=weather.nodes,
        max_replicas=weather.nodes,
        max_queue=4 * weather.streams,
    )
    async with cluster.client() as client:
        await client.deploy(spec)

        async def is_served() -> bool:
            found = [each for each in await client.replicas(MODEL) if each.ready_unix_seconds]
            return len(found) >= weather.nodes

        await until(is_served, f"{weather.nodes} replicas are ready")


async def _fault_free(
    cluster: ChaosCluster, weather: Weather, say: Callable[[str], None]
) -> dict[Ask, Answer]:
    """Return every request with its answer while nothing fails."""
    clients = Clients(cluster.gateways, Tally())
    room = asyncio.Semaphore(REFERENCE_CLIENTS)
    wanted: dict[Ask, Answer] = {}

    async def ask_once(ask: Ask) -> None:
        async with room:
            wanted[ask] = await clients.answer(ask)

    try:
        async with asyncio.TaskGroup() as group:
            for ask in asks(weather.requests, tokens=weather.tokens, seed=weather.seed):
                group.create_task(ask_once(ask))
    finally:
        await clients.close()
    say(f"{len(wanted)} fault-free answers, {sum(answer.tokens for answer in wanted.values())} tokens")
    return wanted


async def _storm(
    cluster: ChaosCluster,
    weather: Weather,
    wanted: dict[Ask, Answer],
    account: Account,
    say: Callable[[str], None],
) -> None:
    """Load and faults, until the time is up and every stream has ended."""
    gateways_die = not {"kill gateway", "pause gateway"}.isdisjoint(weather.kinds)
    clients = Clients(cluster.gateways, account.tally, gateways_die=gateways_die)
    stop = asyncio.Event()
    limit_seconds = weather.seconds + CALM_SECONDS
    if weather.rolling:
        limit_seconds += ROLL_SECONDS * len(cluster.titles())
    try:
        async with asyncio.timeout(limit_seconds), asyncio.TaskGroup() as group:
            for number in range(weather.streams):
                group.create_task(
                    keep_asking(
                        clients,
                        wanted,
                        account.tally,
                        seed=weather.seed * 1000 + number,
                        rest_seconds=weather.rest_seconds,
                        stop=stop,
                    )
                )
            group.create_task(_trouble(cluster, weather, account, say, stop))
    finally:
        await clients.close()


async def _trouble(
    cluster: ChaosCluster, weather: Weather, account: Account, say: Callable[[str], None], stop: asyncio.Event
) -> None:
    try:
        if weather.kinds:
            await _faults(cluster, weather, account, say)
        if weather.rolling:
            await cluster.until_open()
            account.faults["replace"] = await roll(cluster, say, one_of_each=weather.one_of_each)
    except TimeoutError as error:
        account.broken.append(f"upgrade: {error}")
    finally:
        stop.set()


async def _faults(
    cluster: ChaosCluster, weather: Weather, account: Account, say: Callable[[str], None]
) -> None:
    began = time.monotonic()
    faults = Faults(cluster, lambda what: say(f"{time.monotonic() - began:6.1f} s  {what}"))

    async def do(fault: Fault) -> None:
        try:
            await faults.do(fault)
        except (TimeoutError, StokerError) as error:
            account.broken.append(f"{fault.kind}: {error}")

    try:
        async with asyncio.TaskGroup() as group:
            for fault in schedule(weather.seed, every_seconds=weather.every_seconds, kinds=weather.kinds):
                if time.monotonic() - began > weather.seconds:
                    break
                group.create_task(do(fault))
                await asyncio.sleep(fault.pause_seconds)
    finally:
        account.faults = faults.done
