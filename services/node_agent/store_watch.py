"""What the store of this host says about itself, kept fresh."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from stoker import log
from stoker.errors import StokerError
from stoker.rpc import cancelled_after, connect, translated
from stoker.v1.checkpoint_store_pb2 import GetStatusRequest, StoreStatus
from stoker.v1.checkpoint_store_pb2_grpc import CheckpointStoreStub

FIRST_RETRY_SECONDS = 0.1
LONGEST_RETRY_SECONDS = 2.0


class StoreWatch:
    """Follows a store's `WatchStatus`.

    Args:
        address: `host:port` of the store.
        on_change: Called when `status` changed.
    """

    def __init__(self, address: str, on_change: Callable[[bool], None]) -> None:
        self._address = address
        self._on_change = on_change
        self.status: StoreStatus | None = None
        """The latest; None while the store cannot be reached."""

    async def run(self) -> None:
        """Watch for ever, also while there is no store."""
        retry_seconds = FIRST_RETRY_SECONDS
        async with connect(self._address) as channel:
            stub = CheckpointStoreStub(channel)
            while True:
                message = "it ended the stream"
                try:
                    with (
                        translated(f"store {self._address}"),
                        cancelled_after(stub.WatchStatus(GetStatusRequest())) as statuses,
                    ):
                        async for status in statuses:
                            is_first = self.status is None
                            self.status = status
                            retry_seconds = FIRST_RETRY_SECONDS
                            if is_first:
                                log.get().info("store.joined", address=self._address)
                            self._on_change(is_first)
                except StokerError as error:
                    message = error.message
                if self.status is not None:
                    log.get().warning("store.lost", address=self._address, message=message)
                    self.status = None
                    self._on_change(True)
                await asyncio.sleep(retry_seconds)
                retry_seconds = min(2 * retry_seconds, LONGEST_RETRY_SECONDS)
