"""Tasks that live exactly as long as a block, and errors that come out of it as they are."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Coroutine


class Background:
    """The tasks of one `background` block."""

    def __init__(self, group: asyncio.TaskGroup) -> None:
        self._group = group
        self._tasks: set[asyncio.Task[None]] = set()

    def start(self, work: Coroutine[Any, Any, None], *, name: str) -> asyncio.Task[None]:
        """Run `work` until it ends, is cancelled, or the block ends."""
        task = self._group.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def cancel(self) -> None:
        """Cancel all that still run."""
        for task in self._tasks:
            task.cancel()


@asynccontextmanager
async def background() -> AsyncGenerator[Background, None]:
    """Yield a place for tasks that are cancelled and awaited when the block ends.

    A task that fails cancels the block. The first error, of a task or of the block, comes out as itself and
    not in an `ExceptionGroup`, so that callers can catch it by its type; further ones are notes on it.
    """
    try:
        async with asyncio.TaskGroup() as group:
            tasks = Background(group)
            yield tasks
            tasks.cancel()
    except BaseExceptionGroup as errors:
        first, *others = errors.exceptions
        for other in others:
            first.add_note(f"and then: {other!r}")
        raise first from first.__cause__
