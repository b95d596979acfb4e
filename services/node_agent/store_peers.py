"""Tells this host's store where the stores of other hosts are, as the controller says."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence

from stoker import log
from stoker.errors import StokerError
from stoker.rpc import connect, translated
from stoker.v1.checkpoint_store_pb2 import SetPeersRequest
from stoker.v1.checkpoint_store_pb2_grpc import CheckpointStoreStub

ANSWER_SECONDS = 10.0
RETRY_SECONDS = 1.0


class StorePeers:
    """The latest list, brought to the store whenever either is new.

    Args:
        address: `host:port` of the store.
        shares: Tells whether the store is there and shares with others.
    """

    def __init__(self, address: str, shares: Callable[[], bool]) -> None:
        self._address = address
        self._shares = shares
        self._addresses: tuple[str, ...] | None = None
        self._changed = asyncio.Event()

    def named(self, addresses: Sequence[str]) -> None:
        """Take over what the controller says."""
        self._addresses = tuple(addresses)
        self._changed.set()

    def store_changed(self) -> None:
        """Note that the store has come or gone: a new one knows nothing."""
        self._changed.set()

    async def run(self) -> None:
        """Tell for ever."""
        async with connect(self._address) as channel:
            stub = CheckpointStoreStub(channel)
            while True:
                await self._changed.wait()
                self._changed.clear()
                addresses = self._addresses
                if addresses is None or not self._shares():
                    continue
                try:
                    with translated(f"store {self._address}"):
                        await stub.SetPeers(SetPeersRequest(addresses=addresses), timeout=ANSWER_SECONDS)
                except StokerError as error:
                    log.get().warning("store.peers_not_told", address=self._address, message=error.message)
                    await asyncio.sleep(RETRY_SECONDS)
                    self._changed.set()
