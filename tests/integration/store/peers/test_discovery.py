"""Stores that nobody configured with each other: the controller tells them, through their agents."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Self

from stoker.cli.free_ports import free_ports
from stoker.rpc import connect
from stoker.units import KIB, MIB
from stoker.v1 import checkpoint_store_pb2 as pb
from stoker.v1.checkpoint_store_pb2_grpc import CheckpointStoreStub
from tests.integration.node_agent.processes import ServiceProcess
from tests.integration.store.origin_server import origin_server
from tests.unit.services.store.checkpoints import write_checkpoint

PATIENCE_SECONDS = 150


class Fleet:
    """A controller, and hosts of a store and an agent each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.controller = f"127.0.0.1:{free_ports(1)[0]}"
        self.stores: list[ServiceProcess] = []
        self.addresses: list[str] = []
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> Self:
        state = f"embedded://{self.folder / 'state.db'}"
        await self._stack.enter_async_context(
            ServiceProcess("controller", address=self.controller, state=state)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._stack.aclose()

    async def add_host(self, name: str) -> None:
        """Start a host's store and agent."""
        run_dir = self.folder / name
        run_dir.mkdir()
        address = f"unix:{run_dir}/store.sock"
        store = ServiceProcess(
            "store",
            address=address,
            run_dir=run_dir,
            pool_bytes=16 * MIB,
            chunk_bytes=256 * KIB,
            peer_address="127.0.0.1:0",
        )
        self.stores.append(await self._stack.enter_async_context(store))
        self.addresses.append(address)
        agent = ServiceProcess(
            "node_agent",
            address="127.0.0.1:0",
            node_id=name,
            store=address,
            attach_socket=run_dir / "attach.sock",
            run_dir=run_dir,
            log_dir=run_dir / "logs",
            controllers=[self.controller],
            use_gpus=False,
            prestarted_workers=0,
            heartbeat_seconds=0.2,
        )
        await self._stack.enter_async_context(agent)

    async def prefetch(self, address: str, uri: str) -> dict[str, int]:
        """Load a checkpoint; returns the bytes by tier."""
        async with connect(address) as channel:
            reply = await CheckpointStoreStub(channel).Prefetch(
                pb.PrefetchRequest(uri=uri), timeout=PATIENCE_SECONDS
            )
        return {each.tier: each.bytes for each in reply.transfers}


async def test_stores_of_one_cluster_find_each_other_and_read_an_origin_once(tmp_path: Path) -> None:
    model = write_checkpoint(tmp_path / "model", size=2 * MIB)
    size = (model / "model.safetensors").stat().st_size
    with origin_server(model) as origin:
        async with asyncio.timeout(PATIENCE_SECONDS), Fleet(tmp_path) as fleet:
            await fleet.add_host("a")
            await fleet.add_host("b")  # the first one hears of it with its next heartbeat
            for store in fleet.stores:
                await store.wait_for_log("peer.linked")
            tiers = await asyncio.gather(*(fleet.prefetch(each, origin.url) for each in fleet.addresses))

    assert [sum(tier.values()) for tier in tiers] == [size] * 2
    assert sum(tier.get("remote", 0) for tier in tiers) < 1.5 * size  # a store short of time asks itself
