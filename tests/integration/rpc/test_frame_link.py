"""Links over real sockets: what is sent arrives, from any thread, however slowly it is read."""

from __future__ import annotations

import asyncio
import socket

from stoker.errors import PeerError
from stoker.frames import FrameLink, framed

LIMIT_SECONDS = 60


class End:
    """One end of a link, and what came to it."""

    def __init__(self, connection: socket.socket) -> None:
        self.frames: asyncio.Queue[bytes] = asyncio.Queue()
        self.ended: asyncio.Future[str] = asyncio.get_running_loop().create_future()
        self.link = FrameLink(connection, on_frame=self.take, on_end=self.ended.set_result)

    def take(self, frame: bytes) -> None:
        """Keep a frame; refuse one that says so."""
        if frame == b"bad":
            raise PeerError("that was no message")
        if frame == b"zebra":
            raise RuntimeError("zebra")
        self.frames.put_nowait(frame)


async def test_what_one_thread_sends_arrives_in_order_also_when_the_socket_is_full() -> None:
    ours, theirs = socket.socketpair()
    sender = End(ours)
    sent = [bytes([number % 256]) * 10_000 for number in range(200)]  # more than a socket's buffer holds

    def send_all() -> None:
        for message in sent:
            sender.link.send(message)

    await asyncio.to_thread(send_all)
    reader = End(theirs)
    async with asyncio.timeout(LIMIT_SECONDS):
        came = [await reader.frames.get() for _ in sent]
    sender.link.close()
    reader.link.close()

    assert came == sent


async def test_an_end_that_goes_is_told_once_and_after_all_it_had_sent() -> None:
    ours, theirs = socket.socketpair()
    end = End(ours)
    theirs.sendall(framed(b"last"))
    theirs.close()

    async with asyncio.timeout(LIMIT_SECONDS):
        reason = await end.ended

    assert "closed" in reason
    assert end.frames.get_nowait() == b"last"
    end.link.send(b"nobody reads this")


async def test_a_frame_that_is_no_message_ends_the_link() -> None:
    ours, theirs = socket.socketpair()
    end = End(ours)
    theirs.sendall(framed(b"bad") + framed(b"more"))

    async with asyncio.timeout(LIMIT_SECONDS):
        reason = await end.ended

    assert reason == "that was no message"
    assert end.frames.empty()
    assert theirs.recv(1) == b""
    theirs.close()


async def test_what_nobody_foresaw_ends_the_link_and_is_told_to_the_loop() -> None:
    """Were it to go on, a token would be lost in silence."""
    crashed: list[object] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, told: crashed.append(told["exception"]))
    ours, theirs = socket.socketpair()
    end = End(ours)
    theirs.sendall(framed(b"zebra") + framed(b"more"))

    async with asyncio.timeout(LIMIT_SECONDS):
        reason = await end.ended

    assert "zebra" in reason
    assert end.frames.empty()
    await asyncio.sleep(0)
    assert [str(error) for error in crashed] == ["zebra"]
    theirs.close()


async def test_closing_a_link_tells_the_other_end_only() -> None:
    ours, theirs = socket.socketpair()
    near, far = End(ours), End(theirs)
    near.link.close()
    near.link.close()

    async with asyncio.timeout(LIMIT_SECONDS):
        await far.ended

    assert not near.ended.done()
