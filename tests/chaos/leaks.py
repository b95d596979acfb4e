"""What a cluster may not have when all is over: processes, descriptors, leases, reservations, chunks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from services.controller.records import RESERVATIONS
from stoker.client import AsyncClient
from stoker.rpc import connect
from stoker.state.open import open_state
from stoker.v1 import checkpoint_store_pb2, checkpoint_store_pb2_grpc
from tests.chaos.asks import MODEL
from tests.chaos.cluster import ChaosCluster, until

SPARE_DESCRIPTORS = 16
"""That a service may have more than at the start: connections that come and go."""
ENDED_SECONDS = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Baseline:
    """What a cluster has when nobody has asked for anything."""

    descendants: Mapping[str, int]
    """Processes below each service, by its title."""
    descriptors: Mapping[str, int]


@dataclass(slots=True)
class Leaks:
    """What was found; all empty when nothing leaks."""

    found: list[str] = field(default_factory=list)

    def expect(self, is_true: bool, what: str) -> None:  # noqa: FBT001 - a check reads like a sentence
        """Note what is found unless it is as it should be."""
        if not is_true:
            self.found.append(what)


async def measure(cluster: ChaosCluster) -> Baseline:
    """Return what each service has now; waits until all of them are there."""
    processes: dict[str, psutil.Process] = {}
    for title in cluster.titles():
        await until(lambda title=title: cluster.process(title), f"{title} runs")
        process = cluster.process(title)
        assert process is not None
        processes[title] = process
    return Baseline(
        descendants={title: len(process.children(recursive=True)) for title, process in processes.items()},
        descriptors={title: process.num_fds() for title, process in processes.items()},
    )


async def find_leaks(cluster: ChaosCluster, before: Baseline, model_uri: str) -> Leaks:
    """Delete the model and return what is still held though nobody asks for anything.

    Args:
        cluster: Without faults and load.
        before: As it was before the first of them.
        model_uri: The checkpoint that was served.
    """
    leaks = Leaks()
    async with cluster.client() as client:
        try:
            await until(lambda: _is_idle(client), "no session runs")
            await client.delete(MODEL)
            await until(lambda: _has_no_replica(client), "every replica of the deleted model is stopped")
        except TimeoutError as error:
            leaks.found.append(str(error))
    for node in cluster.nodes:
        await _check_store(node.store, node.node_id, model_uri, leaks)

    async def is_as_before() -> bool:
        now = await measure(cluster)
        return all(now.descendants[title] <= count for title, count in before.descendants.items())

    try:
        await until(is_as_before, "the agents have no more workers than at the start")
    except TimeoutError as error:
        leaks.found.append(f"{error}: {before.descendants} became {(await measure(cluster)).descendants}")
    now = await measure(cluster)
    for title, count in now.descriptors.items():
        allowed = before.descriptors[title] + SPARE_DESCRIPTORS
        leaks.expect(count <= allowed, f"{title} has {count} descriptors, {allowed} are explained")
    return leaks


async def find_remains(processes: list[psutil.Process], state_path: Path, run_dir: Path) -> Leaks:
    """Return what a stopped cluster has left behind.

    Args:
        processes: Those it had.
        state_path: Of the controller's state.
        run_dir: Of its sockets.
    """
    leaks = Leaks()
    _, alive = psutil.wait_procs(processes, timeout=ENDED_SECONDS)
    for process in alive:
        if process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            leaks.found.append(f"process {process.pid} still runs: {' '.join(process.cmdline()[:4])}")
    async with open_state(f"embedded://{state_path}") as state:
        reservations = (await state.list(RESERVATIONS)).items
    leaks.expect(not reservations, f"reservations are left: {[item.key for item in reservations]}")
    left = [path.name for path in run_dir.rglob("*") if path.is_socket()]
    leaks.expect(not left, f"sockets are left in {run_dir}: {left}")
    return leaks


async def _is_idle(client: AsyncClient) -> bool:
    replicas = await client.replicas()
    return not any(each.running_sessions or each.waiting_sessions for each in replicas)


async def _has_no_replica(client: AsyncClient) -> bool:
    return not await client.replicas()


async def _check_store(address: str, node_id: str, model_uri: str, leaks: Leaks) -> None:
    async with connect(address) as channel:
        stub = checkpoint_store_pb2_grpc.CheckpointStoreStub(channel)

        async def status() -> checkpoint_store_pb2.StoreStatus:
            return await stub.GetStatus(checkpoint_store_pb2.GetStatusRequest())

        async def has_no_lease() -> bool:
            return not (await status()).pool.leased_bytes

        try:
            await until(has_no_lease, f"nobody leases anything of the store of {node_id}")
        except TimeoutError as error:
            leaks.found.append(str(error))
            return
        await stub.Evict(checkpoint_store_pb2.EvictRequest(uri=model_uri))
        pool = (await status()).pool
        held = pool.total_bytes - pool.free_bytes
        leaks.expect(held == 0, f"{held} bytes of the pool of {node_id} belong to nobody")
