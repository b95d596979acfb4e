"""A forecast's order reaches a real store: the bytes are in its memory before the request that wants them."""

from __future__ import annotations

import asyncio
from pathlib import Path

from services.controller.cluster_view.forecast import arrived
from services.controller.cluster_view.learnt import Arrivals
from services.controller.cluster_view.view import Pool, View
from services.controller.forecaster import Forecaster
from services.controller.orders import Orders
from services.controller.records import ModelRecord
from services.controller.scaling.foresight import Limits
from services.controller.settings import ControllerSettings
from stoker.background import background
from stoker.clock import ManualClock
from stoker.ids import CheckpointUri, ModelName, Revision
from stoker.units import KIB, MIB
from stoker.v1 import model_pb2
from tests.integration.store.daemon import running
from tests.integration.store.test_store import (
    SECONDS,
    contents,
    files,
    load,
    loads_logged,
    wait_for_status,
    write_checkpoint,
)
from tests.unit.services.controller.builders import a_model, a_node, a_view

NAME = ModelName("m")


class OneModel:
    """A cluster of one store and one deployed model; keeps the events that are told."""

    def __init__(self, view: View, uri: str) -> None:
        self.view = view
        checkpoint = model_pb2.CheckpointInfo(uri=uri)
        spec = model_pb2.ModelSpec(name=NAME)
        record = ModelRecord(spec=spec, checkpoint=checkpoint, generation=1, created_unix_seconds=0.0)
        self.records = {NAME: record}
        self.told: list[str] = []
        self.prefetch_over = asyncio.Event()

    def tell(self, kind: str, **fields: object) -> None:
        """Keep the event's kind."""
        del fields
        self.told.append(kind)
        if kind in {"prefetch.ended", "prefetch.failed"}:
            self.prefetch_over.set()


def every_minute(now_seconds: float) -> Arrivals:
    found = None
    for ago in range(12, 0, -1):
        found = arrived(found, now_seconds - 60.0 * ago)
    assert found is not None
    return found


async def test_a_forecast_models_bytes_are_in_memory_before_anybody_asks(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", sizes=[MIB, 300 * KIB])
    weight_bytes = (folder / "model.safetensors").stat().st_size
    clock = ManualClock()
    with running(tmp_path / "run", chunk_bytes=64 * KIB, pool_bytes=4 * MIB) as daemon:
        model = a_model(
            NAME, checkpoint_uri=CheckpointUri(str(folder)), revision=Revision(""), file_bytes=weight_bytes
        )
        node = a_node(store_address=daemon.address, pool=Pool(total_bytes=4 * MIB, free_bytes=4 * MIB))
        arrivals = {NAME: every_minute(clock.now_seconds())}
        cluster = OneModel(a_view(models=(model,), nodes=(node,), arrivals=arrivals), str(folder))
        orders = Orders(ControllerSettings(state="embedded://:memory:"), fence=1)
        limits = Limits(least_gain_seconds=0.0)
        try:
            async with background() as tasks:
                forecaster = Forecaster(cluster, orders, limits, look_seconds=5.0, clock=clock)
                forecaster.look(tasks)
                async with asyncio.timeout(SECONDS):
                    await cluster.prefetch_over.wait()
        finally:
            await orders.close()

        held = wait_for_status(daemon, lambda found: found.checkpoints and found.checkpoints[0].dram_bytes)
        assert cluster.told[-1] == "prefetch.ended"
        assert held.checkpoints[0].dram_bytes >= weight_bytes
        assert len(loads_logged(daemon)) == 1

        with load(daemon, folder) as attached:  # the request comes: nothing is read for it
            assert contents(attached) == files(folder)
        assert len(loads_logged(daemon)) == 1
