"""A real controller process between fake nodes and clients, on both state backends."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Generator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stoker.errors import (
    AlreadyExists,
    CallerError,
    CannotMeetDeadline,
    CheckpointInvalid,
    DeadlineExceeded,
    DoesNotFit,
    LoadFailed,
    ModelNotFound,
    NotLeader,
    PeerError,
)
from stoker.rpc import connect, translated
from stoker.v1 import checkpoint_store_pb2, controller_pb2, model_pb2
from tests.integration.controller.harness import Client, ControllerProcess, FakeNode, until
from tests.integration.etcd_server import etcd_server

if TYPE_CHECKING:
    from tests.integration.etcd_server import EtcdServer


@pytest.fixture(scope="module")
def etcd() -> Generator[EtcdServer, None, None]:
    with etcd_server() as server:
        yield server


@pytest.fixture(params=["embedded", pytest.param("etcd", marks=pytest.mark.etcd)])
def state(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A fresh state of each backend."""
    if request.param == "embedded":
        return f"embedded://{tmp_path}/state.db"
    server: EtcdServer = request.getfixturevalue("etcd")
    return f"etcd://{server.endpoint}/{tmp_path.name}"


class Deployment:
    """A controller, its nodes and a client."""

    def __init__(self, stack: AsyncExitStack, folder: Path, state: str) -> None:
        self._stack = stack
        self._folder = folder
        self._state = state
        self.controller: ControllerProcess
        self.client: Client

    async def controller_with(self, **settings: float | str) -> None:
        """Start the controller."""
        self.controller = self.another(**settings)
        self.controller.start()
        channel = await self._stack.enter_async_context(connect(self.controller.address))
        self.client = Client(channel)
        await until(self.leads)

    def another(self, **settings: float | str) -> ControllerProcess:
        """Return one more controller on the same state."""
        controller = ControllerProcess(self._folder, self._state, **settings)
        self._stack.callback(controller.kill)
        return controller

    async def node(self, node_id: str = "node-1", *, devices: int = 1) -> FakeNode:
        """Have a node join."""
        node = FakeNode(node_id, devices=devices)
        await self._stack.enter_async_context(node.serving())
        await self._stack.enter_async_context(node.joined(self.controller.address))
        await until(lambda: self.knows(node_id))
        return node

    async def leads(self) -> bool:
        """Tell whether the controller answers as leader."""
        with translated("controller"):
            status = await self.client.stub.GetClusterStatus(controller_pb2.GetClusterStatusRequest())
        return bool(status.leading)

    async def knows(self, node_id: str) -> bool:
        """Tell whether the controller lists the node as reachable."""
        with translated("controller"):
            listed = await self.client.stub.ListNodes(controller_pb2.ListNodesRequest())
        return any(node.report.node_id == node_id and node.reachable for node in listed.nodes)

    async def has_pool(self, node_id: str, total_bytes: int) -> bool:
        """Tell whether the controller knows that the node's pool has this size."""
        with translated("controller"):
            listed = await self.client.stub.ListNodes(controller_pb2.ListNodesRequest())
        pools = {node.report.node_id: node.report.store.pool.total_bytes for node in listed.nodes}
        return pools.get(node_id) == total_bytes

    async def ready_replicas(self, model: str) -> int:
        """Return how many ready replicas of a model are listed."""
        return (await self.client.models())[model].ready_replicas


@pytest.fixture
async def cluster(state: str, tmp_path: Path) -> AsyncGenerator[Deployment, None]:
    async with AsyncExitStack() as stack:
        yield Deployment(stack, tmp_path, state)


async def test_a_deployed_model_is_listed_cold_with_the_defaults_filled_in(cluster: Deployment) -> None:
    await cluster.controller_with(keep_alive_seconds=77)
    await cluster.node()

    answer = await cluster.client.deploy("m")
    again = await cluster.client.deploy("m")
    changed = await cluster.client.deploy("m", keep_alive_seconds=0)

    assert (answer.created, answer.changed) == (True, True)
    assert answer.model.spec.keep_alive_seconds == 77
    assert (again.created, again.changed) == (False, False)
    assert (changed.created, changed.changed, changed.model.generation) == (False, True, 2)
    listed = (await cluster.client.models())["m"]
    assert listed.state == model_pb2.MODEL_STATE_COLD
    assert listed.spec.keep_alive_seconds == 0
    assert listed.checkpoint.architecture == "LlamaForCausalLM"


async def test_a_deployment_that_is_not_sound_is_refused_with_what_to_change(cluster: Deployment) -> None:
    await cluster.controller_with()
    with pytest.raises(PeerError, match="no node has joined"):
        await cluster.client.deploy("m")
    await cluster.node()
    await cluster.client.deploy("m")

    with pytest.raises(CallerError, match="model name"):
        await cluster.client.deploy("-m")
    with pytest.raises(CallerError, match="min_replicas 3 is above max_replicas 2"):
        await cluster.client.deploy("n", min_replicas=3, max_replicas=2)
    with pytest.raises(CheckpointInvalid, match="no such folder"):
        await cluster.client.deploy("n", uri="/nowhere")
    with pytest.raises(CheckpointInvalid, match="GPT2LMHeadModel, which no engine"):
        await cluster.client.deploy("n", uri="/models/gpt2")
    with pytest.raises(AlreadyExists), translated("controller"):
        await cluster.client.stub.Deploy(
            controller_pb2.DeployRequest(
                spec=model_pb2.ModelSpec(name="m", checkpoint_uri="/models/a"), create_only=True
            )
        )
    assert list(await cluster.client.models()) == ["m"]


async def test_ten_requests_for_a_cold_model_cause_one_start(cluster: Deployment) -> None:
    await cluster.controller_with()
    node = await cluster.node(devices=4)
    await cluster.client.deploy("m", max_replicas=4, concurrency=10)

    ready = await asyncio.gather(*[cluster.client.acquire("m") for _ in range(10)])

    assert len(node.starts) == 1
    assert {answer.replica.replica_id for answer in ready} == set(node.starts)
    assert {answer.replica.agent_address for answer in ready} == {node.address}
    assert ready[0].timings.total_seconds > 0
    assert len(cluster.controller.log("replica.placed")) == 1
    assert len(cluster.controller.log("replica.ready")) == 1


async def test_a_request_for_an_unknown_model_is_told_near_names(cluster: Deployment) -> None:
    await cluster.controller_with()
    await cluster.node()
    await cluster.client.deploy("smollm2")

    with pytest.raises(ModelNotFound, match="did you mean smollm2"):
        await cluster.client.acquire("smolm2")


async def test_a_client_that_leaves_does_not_abort_the_start(cluster: Deployment) -> None:
    await cluster.controller_with()
    node = await cluster.node()
    node.auto_ready = False
    await cluster.client.deploy("m")
    waiting = asyncio.create_task(cluster.client.acquire("m"))
    await until(lambda: node.starts)

    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    node.make_ready(node.starts[0])

    assert (await cluster.client.acquire("m")).replica.replica_id == node.starts[0]
    assert (len(node.starts), node.stops) == (1, [])


async def test_an_unused_replica_is_stopped_after_its_keep_alive_and_its_slot_is_free(
    cluster: Deployment,
) -> None:
    await cluster.controller_with()
    node = await cluster.node()
    await cluster.client.deploy("m", keep_alive_seconds=0.2)
    await cluster.client.deploy("n", uri="/models/b", keep_alive_seconds=-1)

    await cluster.client.acquire("m")
    await until(lambda: node.stops)
    ready = await cluster.client.acquire("n")

    assert node.stops == [(node.starts[0], True, "keep-alive is over")]
    assert ready.replica.replica_id == node.starts[1]


async def test_an_idle_replica_makes_room_for_a_cold_model_and_a_busy_one_does_not(
    cluster: Deployment,
) -> None:
    await cluster.controller_with()
    node = await cluster.node()
    await cluster.client.deploy("m", keep_alive_seconds=-1)
    await cluster.client.deploy("n", uri="/models/b", keep_alive_seconds=-1)
    first = (await cluster.client.acquire("m")).replica.replica_id
    node.busy.add(first)
    node.replicas[first].running_sessions = 1
    node.report()

    with pytest.raises(DeadlineExceeded, match="no free room"):
        await cluster.client.acquire("n", timeout_seconds=0.7)
    node.busy.clear()
    node.replicas[first].running_sessions = 0
    node.report()
    second = (await cluster.client.acquire("n")).replica.replica_id

    assert node.starts == [first, second]
    assert node.stops == [(first, True, "makes room for n")]


async def test_a_killed_controller_comes_back_without_losing_or_restarting_anything(
    cluster: Deployment,
) -> None:
    await cluster.controller_with()
    node = await cluster.node(devices=2)
    await cluster.client.deploy("m", keep_alive_seconds=-1)
    await cluster.client.deploy("n", uri="/models/b", keep_alive_seconds=-1)
    running = (await cluster.client.acquire("m")).replica.replica_id
    node.auto_ready = False
    waiting = asyncio.create_task(cluster.client.acquire("n"))
    await until(lambda: len(node.starts) == 2)

    cluster.controller.kill()
    with pytest.raises(PeerError):
        await waiting
    cluster.controller.start()
    await until(lambda: cluster.knows("node-1"))
    asked_again = asyncio.create_task(cluster.client.acquire("n"))
    node.make_ready(node.starts[1])

    assert (await asked_again).replica.replica_id == node.starts[1]
    assert (await cluster.client.acquire("m")).replica.replica_id == running
    assert sorted(await cluster.client.models()) == ["m", "n"]
    assert (len(node.starts), node.stops) == (2, [])


async def test_a_failed_load_is_told_to_who_waits_and_the_model_rests(cluster: Deployment) -> None:
    await cluster.controller_with(backoff_first_seconds=30)
    node = await cluster.node()
    node.fail_with = "tensor lm_head.weight is truncated"
    await cluster.client.deploy("m")

    with pytest.raises(LoadFailed, match="weight is truncated") as first:
        await cluster.client.acquire("m")
    with pytest.raises(LoadFailed) as second:
        await cluster.client.acquire("m")

    assert len(node.starts) == 1
    assert 1 <= (first.value.retry_after_seconds or 0) <= 30
    assert 1 <= (second.value.retry_after_seconds or 0) <= 30
    assert (await cluster.client.models())["m"].state == model_pb2.MODEL_STATE_FAILED
    await until(lambda: node.stops)


async def test_a_failed_model_is_tried_again_after_its_rest(cluster: Deployment) -> None:
    await cluster.controller_with(backoff_first_seconds=0.1)
    node = await cluster.node()
    node.fail_with = "no"
    await cluster.client.deploy("m")
    with pytest.raises(LoadFailed):
        await cluster.client.acquire("m")
    node.fail_with = None

    async def served() -> bool:
        try:
            return bool((await cluster.client.acquire("m")).replica.replica_id)
        except LoadFailed:
            return False

    await until(served)
    assert len(node.starts) == 2


async def test_a_model_larger_than_every_pool_is_refused_with_the_sizes(cluster: Deployment) -> None:
    await cluster.controller_with()
    node = await cluster.node()
    node.file_bytes = 2_000_000_000
    await cluster.client.deploy("m")

    with pytest.raises(DoesNotFit, match=r"2\.0 GB, the store's pool 1\.0 GB"):
        await cluster.client.acquire("m")


async def test_a_deadline_that_no_start_meets_is_refused_before_anything_is_ordered(
    cluster: Deployment,
) -> None:
    await cluster.controller_with()
    node = await cluster.node()
    node.file_bytes, node.pool_bytes = 600_000_000_000, 1_000_000_000_000
    node.report()
    await until(lambda: cluster.has_pool(node.node_id, node.pool_bytes))
    await cluster.client.deploy("m")

    with pytest.raises(CannotMeetDeadline, match=r"at best, from disk, .* it was not started") as refused:
        await cluster.client.acquire("m", deadline_seconds=30.0)

    assert refused.value.details["estimate_seconds"] > 30
    assert not node.starts
    await cluster.client.acquire("m", deadline_seconds=100_000.0)
    assert len(node.starts) == 1


async def test_a_model_that_is_often_asked_for_is_prefetched_and_workers_are_wanted(
    cluster: Deployment,
) -> None:
    await cluster.controller_with(forecast_look_seconds=0.1)
    node = await cluster.node()
    node.file_bytes = 400_000_000
    await cluster.client.deploy("m", keep_alive_seconds=0.0)

    for _ in range(2):
        await cluster.client.acquire("m")
        await until(lambda: not node.replicas)
    await until(lambda: node.prefetches)

    assert node.prefetches[0].uri == "/models/a"
    assert node.prefetches[0].priority == checkpoint_store_pb2.PRIORITY_PREFETCH
    assert node.prefetches[0].free_room_only
    await until(lambda: node.warm_workers_wanted == {1})


async def test_a_deleted_model_is_drained_and_who_waits_learns_it(cluster: Deployment) -> None:
    await cluster.controller_with()
    node = await cluster.node(devices=2)
    await cluster.client.deploy("m", keep_alive_seconds=-1)
    await cluster.client.deploy("n", uri="/models/b")
    await cluster.client.acquire("m")
    node.auto_ready = False
    waiting = asyncio.create_task(cluster.client.acquire("n"))
    await until(lambda: len(node.starts) == 2)

    for name in ("m", "n"):
        with translated("controller"):
            await cluster.client.stub.DeleteModel(controller_pb2.DeleteModelRequest(name=name))

    with pytest.raises(ModelNotFound):
        await waiting
    await until(lambda: len(node.stops) == 2)
    assert {stop[1:] for stop in node.stops} == {(False, "model deleted")}
    assert await cluster.client.models() == {}


async def test_a_redeployed_checkpoint_replaces_the_idle_replica(cluster: Deployment) -> None:
    await cluster.controller_with()
    node = await cluster.node()
    await cluster.client.deploy("m", keep_alive_seconds=-1)
    await cluster.client.acquire("m")

    node.revision = "r2"
    await cluster.client.deploy("m", keep_alive_seconds=-1)
    await until(lambda: node.stops)
    ready = await cluster.client.acquire("m")

    assert ready.replica.replica_id == node.starts[1]
    assert node.replicas[node.starts[1]].revision == "r2"


async def test_min_replicas_are_started_though_nobody_asks(cluster: Deployment) -> None:
    await cluster.controller_with()
    node = await cluster.node(devices=3)
    await cluster.client.deploy("m", min_replicas=2, max_replicas=2, keep_alive_seconds=0)

    async def two_are_ready() -> bool:
        return await cluster.ready_replicas("m") == 2

    await until(two_are_ready)
    assert (len(node.starts), node.stops) == (2, [])


async def test_more_sessions_than_the_concurrency_start_another_replica(cluster: Deployment) -> None:
    await cluster.controller_with()
    node = await cluster.node(devices=2)
    await cluster.client.deploy("m", max_replicas=2, concurrency=2, keep_alive_seconds=-1)
    await cluster.client.acquire("m")

    node.replicas[node.starts[0]].running_sessions = 2
    node.replicas[node.starts[0]].waiting_sessions = 1
    node.report()
    await until(lambda: len(node.starts) == 2)

    assert set(node.replicas) == set(node.starts)


async def test_a_replica_nobody_reserved_is_stopped(cluster: Deployment) -> None:
    await cluster.controller_with(orphan_grace_seconds=0.1)
    node = await cluster.node()
    await cluster.client.deploy("m")
    node.replicas["rep-stray"] = (
        type(node.message())
        .FromString(b"")
        .replicas.add(replica_id="rep-stray", model="m", state=2, devices=[0])
    )
    node.report()

    await until(lambda: node.stops)
    assert node.stops == [("rep-stray", False, "nobody reserved it")]


async def test_routes_are_whole_at_first_and_then_change(cluster: Deployment) -> None:
    await cluster.controller_with(routes_heartbeat_seconds=0.2)
    node = await cluster.node()
    await cluster.client.deploy("m", keep_alive_seconds=-1)
    stream = cluster.client.stub.WatchRoutes(controller_pb2.WatchRoutesRequest(gateway_id="g"), timeout=30)
    updates = aiter(stream)

    snapshot = await anext(updates)
    heartbeat = await anext(updates)
    ready = await cluster.client.acquire("m")
    while not (update := await anext(updates)).routes or not update.routes[0].replicas:
        pass
    node.replicas.clear()
    node.report()
    while not (gone := await anext(updates)).routes or gone.routes[0].replicas:
        pass
    with translated("controller"):
        await cluster.client.stub.DeleteModel(controller_pb2.DeleteModelRequest(name="m"))
    while not (deleted := await anext(updates)).routes or not deleted.routes[0].deleted:
        pass
    stream.cancel()

    assert snapshot.snapshot
    assert [route.model.spec.name for route in snapshot.routes] == ["m"]
    assert list(snapshot.routes[0].store_addresses) == [node.address]
    assert heartbeat.heartbeat
    assert update.routes[0].replicas[0].replica_id == ready.replica.replica_id
    assert deleted.routes[0].model.spec.name == "m"


async def test_a_silent_node_leaves_the_routes_and_its_models_start_elsewhere(
    cluster: Deployment,
) -> None:
    await cluster.controller_with(node_timeout_seconds=1)
    first = FakeNode("node-1")
    async with first.serving():
        async with first.joined(cluster.controller.address):
            await until(lambda: cluster.knows("node-1"))
            await cluster.client.deploy("m", keep_alive_seconds=-1)
            await cluster.client.acquire("m")
        second = await cluster.node("node-2")
        warm = await cluster.client.acquire("m")

        async def is_gone() -> bool:
            return not await cluster.knows("node-1")

        await until(is_gone)
        moved = await cluster.client.acquire("m")

    assert warm.replica.node_id == "node-1"  # a broken stream alone takes nothing away
    assert moved.replica.node_id == "node-2"
    assert len(second.starts) == 1


async def test_a_replica_found_broken_by_a_gateway_is_not_offered_until_its_node_reports(
    cluster: Deployment,
) -> None:
    await cluster.controller_with()
    node = await cluster.node()
    await cluster.client.deploy("m", keep_alive_seconds=-1)
    first = (await cluster.client.acquire("m")).replica.replica_id
    del node.replicas[first]

    second = (await cluster.client.acquire("m", failed_replica_ids=[first])).replica.replica_id

    assert node.starts == [first, second]


async def test_sigterm_ends_the_process_in_order(cluster: Deployment) -> None:
    await cluster.controller_with()
    node = await cluster.node()
    node.auto_ready = False
    await cluster.client.deploy("m")
    waiting = asyncio.create_task(cluster.client.acquire("m"))
    await until(lambda: node.starts)

    status = cluster.controller.terminate()

    assert status == 0
    with pytest.raises(PeerError):
        await waiting
    assert cluster.controller.log("service.stopped")


@pytest.mark.etcd
async def test_a_standby_names_the_leader_and_takes_over_when_it_dies(
    etcd: EtcdServer, tmp_path: Path
) -> None:
    """Only etcd carries several controllers."""
    async with AsyncExitStack() as stack:
        cluster = Deployment(stack, tmp_path, f"etcd://{etcd.endpoint}/{tmp_path.name}")
        await cluster.controller_with()
        standby = cluster.another()
        standby.start()
        client = Client(await stack.enter_async_context(connect(standby.address)))

        async def names_the_leader() -> bool:
            try:
                await client.models()
            except NotLeader as error:
                return error.details["leader"] == cluster.controller.address
            return False

        async def leads() -> bool:
            try:
                return await client.models() == {}
            except NotLeader:
                return False

        await until(names_the_leader)
        cluster.controller.kill()
        await until(leads)
