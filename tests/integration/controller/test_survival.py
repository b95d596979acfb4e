"""Several controllers on an etcd of three: everything that leads is killed, paused or cut off in turn.

One story instead of one test per fault: the faults meet what earlier ones left behind, and the history that
the checker reads at the end has them all.
"""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack, aclosing, asynccontextmanager, suppress
from pathlib import Path

import grpc
import pytest
from etcd3aio import _protobuf as etcd_pb

from stoker.errors import NotFound, PeerError, StokerError
from stoker.rpc import connect, translated
from stoker.state import Changes, Put, open_state
from stoker.v1 import controller_pb2
from tests.integration.controller.harness import PATIENCE_SECONDS, Client, ControllerProcess, FakeNode, until
from tests.integration.controller.history import violations
from tests.integration.etcd_server import EtcdServer, etcd_cluster

pytestmark = pytest.mark.etcd

SETTINGS = {"leader_ttl_seconds": 2, "node_timeout_seconds": 8, "node_forget_seconds": 9}
"""A node's silence is waited out once, idly. Otherwise a new leader must hear of the nodes in time, also on a
busy machine."""
END = "end"


class Controllers:
    """Two controller processes and who asks them."""

    def __init__(self, processes: Sequence[ControllerProcess], clients: Sequence[Client]) -> None:
        self.processes = processes
        self._clients = dict(zip(processes, clients, strict=True))
        self.refusals: list[str] = []

    def client(self, process: ControllerProcess) -> Client:
        """Return the client of one of them."""
        return self._clients[process]

    async def leader(self, among: Sequence[ControllerProcess] = ()) -> ControllerProcess:
        """Return which one of them leads, as soon as one does."""
        found: list[ControllerProcess] = []

        async def one_leads() -> bool:
            for process in among or self.processes:
                with suppress(PeerError), translated("controller"):
                    status = await self._clients[process].stub.GetClusterStatus(
                        controller_pb2.GetClusterStatusRequest(), timeout=1
                    )
                    if status.leading:
                        found.append(process)
            return bool(found)

        await until(one_leads)
        return found[0]

    async def nobody_leads(self) -> bool:
        """Tell whether none of them believes that it leads."""
        leading = []
        for client in self._clients.values():
            with translated("controller"):
                status = await client.stub.GetClusterStatus(controller_pb2.GetClusterStatusRequest())
            leading.append(status.leading)
        return not any(leading)

    async def acquire(
        self, model: str, *, of: Sequence[ControllerProcess] = ()
    ) -> controller_pb2.AcquireReady:
        """Ask as a gateway does: again, and of the next one, while nobody answers."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            for client in itertools.cycle([self._clients[process] for process in of or self.processes]):
                try:
                    return await client.acquire(model)
                except PeerError as error:
                    self.refusals.append(error.message)
                    await asyncio.sleep(0.05)
        raise AssertionError

    async def delete(self, model: str) -> None:
        """Delete a model, asking as `acquire` does: a leader may lose a state that has just come back."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            for client in itertools.cycle(self._clients.values()):
                try:
                    with translated("controller"):
                        await client.stub.DeleteModel(controller_pb2.DeleteModelRequest(name=model))
                except NotFound:  # deleted, and not told
                    return
                except PeerError:
                    await asyncio.sleep(0.05)
                else:
                    return

    async def deploy(self, *models: str) -> None:
        """Deploy models that stay once they run, and fit a device each."""
        client = self.client(await self.leader())
        for model in models:
            await client.deploy(model, uri=f"/models/{model}", keep_alive_seconds=-1)


@asynccontextmanager
async def controllers(folder: Path, state: str) -> AsyncGenerator[Controllers, None]:
    """Run two controllers while the block runs."""
    async with AsyncExitStack() as stack:
        processes = [ControllerProcess(folder, state, **SETTINGS) for _ in range(2)]
        clients = []
        for process in processes:
            stack.callback(process.kill)
            process.start()
            clients.append(Client(await stack.enter_async_context(connect(process.address))))
        yield Controllers(processes, clients)


async def etcd_leader(members: Sequence[EtcdServer]) -> EtcdServer:
    """Return the member that leads etcd itself."""
    for member in members:
        async with grpc.aio.insecure_channel(member.endpoint) as channel:
            status = await etcd_pb.MaintenanceStub(channel).Status(etcd_pb.StatusRequest())
        if status.header.member_id == status.leader:
            return member
    raise AssertionError("etcd has no leader")


async def history(url: str) -> list[Changes]:
    """Return all transactions since the first revision."""
    found: list[Changes] = []
    async with open_state(url) as store:
        await store.transact([], [Put(key=END, value=b"")])
        async with asyncio.timeout(PATIENCE_SECONDS), aclosing(store.watch("", after_revision=0)) as events:
            async for event in events:
                assert isinstance(event, Changes), "etcd's history was compacted"
                found.append(event)
                if any(change.key == END for change in event.changes):
                    break
    return found


async def test_no_fault_of_a_leader_or_a_node_gives_a_device_two_owners_or_loses_a_request(
    tmp_path: Path,
) -> None:
    with etcd_cluster() as members:
        url = f"etcd://{','.join(member.endpoint for member in members)}/s"
        async with AsyncExitStack() as stack:
            both = await stack.enter_async_context(controllers(tmp_path, url))
            addresses = [process.address for process in both.processes]
            nodes = [FakeNode(f"node-{number}", devices=3) for number in (1, 2)]
            for node in nodes:
                await stack.enter_async_context(node.serving())
                await stack.enter_async_context(node.joined(*addresses))
            await until(lambda: _knows(both, nodes))
            await both.deploy("warm", "a", "b", "c", "d", "e")
            warm = (await both.acquire("warm")).replica

            await _etcds_leader_dies(both, members)
            await _the_leader_dies_while_a_request_waits(both, nodes)
            await _a_paused_leader_wakes_up(both, nodes)
            await _etcd_is_gone_for_a_while(both, members, nodes)
            await _a_node_is_cut_off(both, nodes, survivor=warm.node_id)

            assert (await both.acquire("warm")).replica.replica_id == warm.replica_id  # never disturbed
        found = await history(url)

    assert violations(found) == []
    assert sum(change.key.startswith("devices/") for event in found for change in event.changes) >= 6


async def _knows(both: Controllers, nodes: Sequence[FakeNode]) -> bool:
    client = both.client(await both.leader())
    with translated("controller"):
        listed = await client.stub.ListNodes(controller_pb2.ListNodesRequest())
    return sum(node.reachable for node in listed.nodes) == len(nodes)


async def _etcds_leader_dies(both: Controllers, members: list[EtcdServer]) -> None:
    dead = await etcd_leader(members)
    dead.kill()

    ready = await both.acquire("a")

    assert ready.replica.replica_id
    dead.launch(members)
    await asyncio.to_thread(dead.wait_until_ready)


async def _the_leader_dies_while_a_request_waits(both: Controllers, nodes: Sequence[FakeNode]) -> None:
    """The new one takes the start over that is on its way: it orders no second one."""
    old = await both.leader()
    before = [node.starts.copy() for node in nodes]
    for node in nodes:
        node.auto_ready = False
    waiting = asyncio.create_task(both.acquire("b"))
    await until(lambda: [node.starts for node in nodes] != before)
    ((node, replica_id),) = [
        (node, node.starts[-1]) for node, known in zip(nodes, before, strict=True) if node.starts != known
    ]

    old.kill()
    await both.leader([process for process in both.processes if process is not old])
    node.make_ready(replica_id)
    ready = await waiting

    assert ready.replica.replica_id == replica_id
    assert sum(len(node.starts) for node in nodes) == sum(map(len, before)) + 1
    for node in nodes:
        node.auto_ready = True
    old.start()


async def _a_paused_leader_wakes_up(both: Controllers, nodes: Sequence[FakeNode]) -> None:
    """It finds a request in its socket, believes that it leads, and must not change a thing."""
    old = await both.leader()
    (new,) = [process for process in both.processes if process is not old]
    old.pause()
    late = asyncio.create_task(both.client(old).acquire("d"))
    await both.leader([new])
    ready = await both.acquire("c", of=[new])
    before = [node.starts.copy() for node in nodes]

    old.resume()
    with pytest.raises(StokerError):
        await late

    async def old_knows() -> bool:
        with translated("controller"):
            status = await both.client(old).stub.GetClusterStatus(controller_pb2.GetClusterStatusRequest())
        return not status.leading and status.leader == new.address

    await until(old_knows)
    assert ready.replica.replica_id
    assert [node.starts for node in nodes] == before
    await until(lambda: bool(old.log("term.lost")))  # its log is read beside its answers


async def _etcd_is_gone_for_a_while(
    both: Controllers, members: Sequence[EtcdServer], nodes: Sequence[FakeNode]
) -> None:
    """Replicas run on, what is cold is refused, and afterwards nothing has been started twice."""
    await both.leader()
    running = [dict(node.replicas) for node in nodes]
    for member in members:
        member.kill()
    await until(both.nobody_leads)
    refused = [process for process in both.processes if await _refuses(both.client(process), "d")]
    stopped = [node.stops.copy() for node in nodes]
    for member in members:
        member.launch(members)
    for member in members:
        await asyncio.to_thread(member.wait_until_ready)

    ready = await both.acquire("d")

    assert refused == list(both.processes)
    assert ready.replica.replica_id
    assert [node.stops for node in nodes] == stopped
    for node, before in zip(nodes, running, strict=True):
        assert before.keys() <= node.replicas.keys()


async def _refuses(client: Client, model: str) -> bool:
    try:
        await client.acquire(model)
    except PeerError:
        return True
    return False


async def _a_node_is_cut_off(both: Controllers, nodes: Sequence[FakeNode], *, survivor: str) -> None:
    """Its models start elsewhere, and when it is back only one of the two replicas stays."""
    (cut,) = [node for node in nodes if node.node_id != survivor]
    (other,) = [node for node in nodes if node.node_id == survivor]
    if not cut.replicas:  # the other one is full
        await both.acquire("e")
    for name in ("a", "b"):  # room on the other one, whatever lies there
        await both.delete(name)
    await until(lambda: not {"a", "b"} & {found.model for node in nodes for found in node.replicas.values()})
    orphans = {replica_id: replica.model for replica_id, replica in cut.replicas.items()}
    model = next(iter(orphans.values()))
    cut.reachable.clear()

    async def elsewhere() -> bool:
        return (await both.acquire(model)).replica.node_id == other.node_id

    await until(elsewhere, pause_seconds=0.2)
    cut.reachable.set()
    cut.report()

    await until(lambda: [found.model for node in nodes for found in node.replicas.values()].count(model) == 1)
