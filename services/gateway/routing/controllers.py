"""Controllers: calls to whichever of them answers. A shell.

The address that answered last is asked first. One that cannot be reached or does not lead gives way to the
next; when all have been tried the caller gets the last error.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import grpc

from stoker import rpc
from stoker.errors import NotLeader, PeerError, StokerError
from stoker.v1 import controller_pb2_grpc

if TYPE_CHECKING:
    from stoker.v1.controller_pb2_grpc import ControllerAsyncStub as Stub

Answer = TypeVar("Answer")

RETRY_AFTER_SECONDS = 2.0


class Controllers:
    """Channels to the controllers.

    Args:
        addresses: `host:port` of each, at least one.
    """

    def __init__(self, addresses: Sequence[str]) -> None:
        self._addresses = tuple(addresses)
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._current = 0

    async def call(self, work: Callable[[Stub], Awaitable[Answer]]) -> Answer:
        """Make a unary call at the first controller that takes it.

        Raises:
            StokerError: What the controller answered, or that none could be reached.
        """
        last: StokerError | None = None
        for _ in self._addresses:
            address, stub = self._pick()
            try:
                with rpc.translated(f"controller {address}"):
                    return await work(stub)
            except PeerError as error:
                if not _elsewhere(error):
                    raise
                last = error
                self._current += 1
        raise _none_answers(last)

    async def stream(
        self, work: Callable[[Stub], grpc.aio.UnaryStreamCall[Any, Answer]]
    ) -> AsyncGenerator[Answer]:
        """Yield a stream's messages; it moves on to the next controller only before the first message.

        Raises:
            ControllerAway: None could be reached, or the one that had begun to answer is gone or leads no
                longer (`begun`): whoever still wants to know asks again, and another one is asked first.
            StokerError: What the controller answered.
        """
        last: StokerError | None = None
        for _ in self._addresses:
            address, stub = self._pick()
            begun = False
            call = work(stub)
            try:
                with rpc.translated(f"controller {address}"):
                    async for message in call:
                        begun = True
                        yield message
            except PeerError as error:
                if not _elsewhere(error):
                    raise
                last = error
                self._current += 1
                if begun:
                    raise ControllerAway(
                        f"controller {address} was lost: {error.message}",
                        retry_after_seconds=RETRY_AFTER_SECONDS,
                        begun=True,
                    ) from error
            else:
                return
            finally:
                call.cancel()  # does nothing to a call that has ended
        raise _none_answers(last)

    async def close(self) -> None:
        """Close all channels."""
        for channel in self._channels.values():
            await channel.close()

    def _pick(self) -> tuple[str, Stub]:
        address = self._addresses[self._current % len(self._addresses)]
        if address not in self._channels:
            self._channels[address] = rpc.connect(address)
        return address, controller_pb2_grpc.ControllerStub(self._channels[address])


class ControllerAway(PeerError):
    """No controller can be reached, or none leads: it may be back soon.

    Args:
        message: What happened.
        retry_after_seconds: When asking again may help.
        begun: A controller had begun to answer.
    """

    def __init__(
        self, message: str, *, retry_after_seconds: float | None = None, begun: bool = False
    ) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds)
        self.begun = begun


def _elsewhere(error: PeerError) -> bool:
    """Say whether another controller may do better: this one is away or not the leader."""
    return type(error) is PeerError or isinstance(error, NotLeader)


def _none_answers(last: StokerError | None) -> StokerError:
    return ControllerAway(
        f"no controller answers: {last}; warm models go on being served",
        retry_after_seconds=RETRY_AFTER_SECONDS,
    )
