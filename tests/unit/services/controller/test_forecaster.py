"""Forecasts carried out: what stores are asked, what agents are told, what is remembered of a failure."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace

from services.controller.cluster_view.demand import Demand, Refusal
from services.controller.cluster_view.forecast import arrived
from services.controller.cluster_view.learnt import Arrivals
from services.controller.cluster_view.view import Held, Pool, View
from services.controller.forecaster import Forecaster
from services.controller.records import ModelRecord
from services.controller.scaling.foresight import Limits
from stoker.background import background
from stoker.clock import ManualClock
from stoker.errors import CapacityError
from stoker.ids import ModelName, NodeId
from stoker.units import GB
from stoker.v1 import model_pb2
from tests.unit.services.controller.builders import a_model, a_node, a_view


class FakeCluster:
    """A view, and the events that were told."""

    def __init__(self, view: View) -> None:
        self.view = view
        self.records = {
            name: ModelRecord(
                spec=model_pb2.ModelSpec(name=name),
                checkpoint=model_pb2.CheckpointInfo(uri=f"/models/{name}", revision="r1"),
                generation=1,
                created_unix_seconds=0.0,
            )
            for name in view.models
        }
        self.told: list[str] = []

    def tell(self, kind: str, **fields: object) -> None:
        """Keep the event's kind."""
        del fields
        self.told.append(kind)


class FakeStores:
    """Stores that answer at once."""

    def __init__(self, *, full: bool = False) -> None:
        """Drop it."""
        self.calls: list[str] = []
        self._full = full

    async def prefetch(self, store_address: str, model: ModelRecord) -> int:
        """Move seven bytes, or be full."""
        self.calls.append(f"prefetch {model.spec.name} at {store_address}")
        if self._full:
            raise CapacityError("the pool is full")
        return 7

    async def evict(self, store_address: str, model: ModelRecord) -> None:
        """Drop it."""
        self.calls.append(f"evict {model.spec.name} at {store_address}")


def often(clock: ManualClock) -> Arrivals:
    found = None
    for number in range(12, 0, -1):
        found = arrived(found, clock.now_seconds() - 60.0 * number)
    assert found is not None
    return found


async def looks(cluster: FakeCluster, stores: FakeStores, clock: ManualClock, count: int) -> Forecaster:
    """Look so many times, with everything that was begun done in between."""
    forecaster = Forecaster(cluster, stores, Limits(memory_fraction=1.0), look_seconds=5.0, clock=clock)
    async with background() as tasks:
        for _ in range(count):
            forecaster.look(tasks)
            await _idle()
    return forecaster


async def _idle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def view_with(clock: ManualClock, *asked: str, dram: Sequence[str] = (), pool_bytes: int = 10 * GB) -> View:
    models = tuple(a_model(name, file_bytes=4 * GB) for name in ("m", "other"))
    held = {model.checkpoint: Held(dram_bytes=model.file_bytes) for model in models if model.name in dram}
    free_bytes = pool_bytes - 4 * GB * len(held)
    node = a_node(held=held, pool=Pool(total_bytes=pool_bytes, free_bytes=free_bytes))
    return a_view(models=models, nodes=(node,), arrivals={ModelName(name): often(clock) for name in asked})


async def test_a_prefetch_is_ordered_and_told_and_agents_learn_how_many_workers() -> None:
    clock, stores = ManualClock(), FakeStores()
    cluster = FakeCluster(view_with(clock, "m"))

    forecaster = await looks(cluster, stores, clock, 1)

    assert stores.calls == ["prefetch m at a:7072"]
    assert cluster.told == ["workers.wanted", "prefetch.ordered", "prefetch.ended"]
    assert forecaster.warm_workers(NodeId("a")) == 1
    assert forecaster.warm_workers(NodeId("b")) is None


async def test_what_makes_room_is_dropped_first() -> None:
    clock, stores = ManualClock(), FakeStores()
    cluster = FakeCluster(view_with(clock, "m", dram=["other"], pool_bytes=6 * GB))

    await looks(cluster, stores, clock, 1)

    assert stores.calls == ["evict other at a:7072", "prefetch m at a:7072"]


async def test_a_prefetch_that_found_no_room_rests() -> None:
    clock, stores = ManualClock(), FakeStores(full=True)
    cluster = FakeCluster(view_with(clock, "m"))

    await looks(cluster, stores, clock, 3)

    assert stores.calls == ["prefetch m at a:7072"]
    assert cluster.told[-1] == "prefetch.failed"


async def test_without_any_history_nothing_is_ordered_and_agents_do_as_configured() -> None:
    clock, stores = ManualClock(), FakeStores()
    cluster = FakeCluster(view_with(clock))

    forecaster = await looks(cluster, stores, clock, 2)

    assert (stores.calls, cluster.told) == ([], [])
    assert forecaster.warm_workers(NodeId("a")) is None


async def test_after_a_prefetch_that_went_well_the_next_look_comes_soon() -> None:
    clock, stores = ManualClock(), FakeStores()
    cluster = FakeCluster(view_with(clock, "m"))
    forecaster = Forecaster(cluster, stores, Limits(memory_fraction=1.0), look_seconds=60.0, clock=clock)

    async with background() as tasks:
        forecaster.look(tasks)
        await _idle()
        cluster.view = view_with(clock, "m", "other", dram=["m"])
        clock.advance(1.0)
        await _idle()

    assert stores.calls == ["prefetch m at a:7072", "prefetch other at a:7072"]


async def test_between_looks_what_waits_for_room_is_read_and_nothing_else() -> None:
    clock, stores = ManualClock(), FakeStores()
    waiting = waiting_view(clock)
    forecaster = Forecaster(FakeCluster(waiting), stores, Limits(), look_seconds=5.0, clock=clock)

    async with background() as tasks:
        forecaster.attend(tasks)
        await _idle()

    assert stores.calls == ["prefetch m at a:7072"]


async def test_between_looks_nothing_is_done_while_nobody_waits() -> None:
    clock, stores = ManualClock(), FakeStores()
    at_ease = replace(waiting_view(clock), refusals={})
    forecaster = Forecaster(FakeCluster(at_ease), stores, Limits(), look_seconds=5.0, clock=clock)

    async with background() as tasks:
        forecaster.attend(tasks)
        await _idle()

    assert stores.calls == []


def waiting_view(clock: ManualClock) -> View:
    """Return a node on whose disk two models are: one waits for room, the other is asked for often."""
    view = view_with(clock, "other")
    (node,) = view.nodes.values()
    held = {model.checkpoint: Held(disk_bytes=model.file_bytes) for model in view.models.values()}
    refusal = Refusal(reason="no free room", at_seconds=clock.now_seconds())
    return replace(
        view,
        nodes={node.node_id: replace(node, held=held)},
        demands={ModelName("m"): Demand(since_seconds=clock.now_seconds(), waiters=1)},
        refusals={ModelName("m"): refusal},
        index=None,
    )
