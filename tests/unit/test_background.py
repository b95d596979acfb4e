"""Background tasks end with their block, and errors come out as themselves."""

from __future__ import annotations

import asyncio

import pytest

from stoker.background import background


async def test_tasks_end_with_the_block() -> None:
    async with background() as tasks:
        task = tasks.start(forever(), name="forever")
        await asyncio.sleep(0)

    assert task.cancelled()


async def test_a_task_that_fails_cancels_the_block_and_its_error_comes_out_alone() -> None:
    with pytest.raises(KeyError, match="task"):  # noqa: PT012 - the block is what is tested
        async with background() as tasks:
            tasks.start(fail(KeyError("task")), name="fails")
            await asyncio.Event().wait()


async def test_of_two_errors_the_first_comes_out_and_names_the_other() -> None:
    with pytest.raises(KeyError, match="first") as caught:  # noqa: PT012 - the block is what is tested
        async with background() as tasks:
            tasks.start(fail(KeyError("first")), name="first")
            tasks.start(fail(ValueError("second")), name="second")
            await asyncio.Event().wait()

    assert caught.value.__notes__ == ["and then: ValueError('second')"]


async def forever() -> None:
    """Wait."""
    await asyncio.Event().wait()


async def fail(error: Exception) -> None:
    """Raise."""
    raise error
