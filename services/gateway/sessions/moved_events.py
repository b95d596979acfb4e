"""A moving session's events: its source's, then its destination's without those that are known. A shell."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing

from services.gateway.sessions.move_rounds import unseen
from services.gateway.sessions.mover import Events, Moved, Mover
from stoker.v1 import session_pb2


async def in_order(moved: Moved, log: Sequence[int]) -> Events:
    """Yield the destination's events without the tokens that are in the log when they come."""
    async with aclosing(moved.rest):
        yield unseen(moved.first, log, moved.epoch)
        async for event in moved.rest:
            yield unseen(event, log, moved.epoch)


async def next_or_moved(events: Events, mover: Mover) -> session_pb2.GenerateEvent | Moved:
    """Return the source's next event, or where to switch to, whichever is there first.

    Raises:
        StokerError: The source failed.
    """
    reading = asyncio.ensure_future(anext(events))
    try:
        await asyncio.wait({reading, mover.task}, return_when=asyncio.FIRST_COMPLETED)
        moved = None if reading.done() else mover.task.result()
        if moved is None:
            return await reading
    finally:
        reading.cancel()
        await asyncio.wait({reading})  # whoever closes the events must find nobody reading them
        if not reading.cancelled():
            reading.exception()  # looked at: it was raised above, or the source failed just as it was left
    mover.take(moved)  # the last step: until here `close` ends the destination's call
    return moved
