"""The embedded backend keeps the protocol, and what is its own: the file, its lock, its bounds."""

from __future__ import annotations

import asyncio
import os
import sqlite3
from contextlib import AbstractAsyncContextManager, aclosing
from typing import TYPE_CHECKING

import pytest

from stoker.clock import ManualClock
from stoker.errors import ConfigError
from stoker.state import Changes, LeaseLost, Resync, StateStore, WatchEvent, open_state
from stoker.state.embedded import open_embedded
from tests.state_suite import TTL_SECONDS, StateSuite, existing, flat, following, put

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator
    from pathlib import Path

    from tests.state_suite import OpenStore


class ManualTime:
    """Leases live by a manual clock."""

    def __init__(self) -> None:
        self.clock = ManualClock()

    async def pass_seconds(self, seconds: float) -> None:
        """Advance in steps short enough for every renewal in between."""
        for _ in range(12):
            self.clock.advance(seconds / 12)
            for _ in range(10):
                await asyncio.sleep(0)


@pytest.fixture
def time() -> ManualTime:
    return ManualTime()


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "state.db"


@pytest.fixture
def open_store(path: Path, time: ManualTime) -> OpenStore:
    def opener() -> AbstractAsyncContextManager[StateStore]:
        return open_state(f"embedded://{path}", clock=time.clock)

    return opener


class TestEmbedded(StateSuite):
    """The one suite, on an SQLite file."""


async def test_a_state_in_memory_ends_with_its_block() -> None:
    for _ in range(2):
        async with open_state("embedded://:memory:") as store:
            assert await store.get("a") is None
            await put(store, "a")


async def test_a_second_opener_is_told_the_folder_and_the_process_that_uses_it(
    open_store: OpenStore, path: Path
) -> None:
    async with open_store() as store:
        with pytest.raises(ConfigError, match=rf"{path.parent} is in use by process {os.getpid()}:"):
            async with open_store():
                pass
        await put(store, "a")

    async with open_store() as store:
        assert await store.get("a") is not None


async def test_leases_have_their_whole_time_again_after_a_restart(
    open_store: OpenStore, time: ManualTime
) -> None:
    async with open_store() as store:
        lease = await store.grant(TTL_SECONDS)
        revision = await put(store, "a", lease_id=lease.id)
        await time.pass_seconds(0.9 * TTL_SECONDS)
    time.clock.advance(100 * TTL_SECONDS)
    async with open_store() as store, aclosing(store.watch("a", after_revision=revision)) as events:
        await time.pass_seconds(0.9 * TTL_SECONDS)
        await store.renew(lease.id)
        await time.pass_seconds(0.9 * TTL_SECONDS)
        assert await store.get("a") is not None
        await time.pass_seconds(0.2 * TTL_SECONDS)

        assert flat(await following(events)) == [("a", None)]
        with pytest.raises(LeaseLost):
            await store.renew(lease.id)


async def test_a_lease_number_is_never_used_again(open_store: OpenStore) -> None:
    async with open_store() as store:
        first = await store.grant(TTL_SECONDS)
        await first.revoke()
    async with open_store() as store:
        assert (await store.grant(TTL_SECONDS)).id > first.id


async def test_history_is_bounded_and_a_watch_from_before_gets_a_resync(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    async with open_embedded(str(path), keep_revisions=50) as store:
        revisions = [await put(store, "a", str(number).encode()) for number in range(200)]
        async with aclosing(store.watch("a", after_revision=revisions[0])) as events:
            assert isinstance(await following(events), Resync)
        async with aclosing(store.watch("a", after_revision=revisions[-51])) as events:
            assert isinstance(await following(events), Changes)
    with sqlite3.connect(path) as database:
        (kept,) = database.execute("SELECT count(*) FROM history").fetchone()
    database.close()

    assert 50 <= kept <= 56


async def test_a_call_that_is_cancelled_leaves_the_state_usable_and_watches_informed(
    open_store: OpenStore,
) -> None:
    async with open_store() as store:
        start = await put(store, "a", b"0")
        calls = [asyncio.create_task(put(store, "a", str(number).encode())) for number in range(20)]
        await asyncio.sleep(0)
        for call in calls[::2]:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        last = await put(store, "a", b"end")
        async with aclosing(store.watch("a", after_revision=start)) as events:
            seen = [event async for event in until(events, last)]

        assert [event.revision for event in seen] == list(range(start + 1, last + 1))
        assert (await existing(store, "a")).value == b"end"


async def until(events: AsyncGenerator[WatchEvent, None], revision: int) -> AsyncGenerator[WatchEvent, None]:
    """Yield the events of a watch up to a revision."""
    async for event in events:
        yield event
        if event.revision >= revision:
            return


async def test_a_file_that_is_no_state_is_refused_and_left_alone(path: Path, open_store: OpenStore) -> None:
    path.parent.mkdir()
    path.write_bytes(b"not a database, but somebody's data" * 100)
    with pytest.raises(ConfigError, match="cannot be opened as a state file"):
        async with open_store():
            pass

    assert path.read_bytes() == b"not a database, but somebody's data" * 100


async def test_a_file_of_a_newer_version_is_refused(path: Path, open_store: OpenStore) -> None:
    async with open_store():
        pass
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version=99")
    database.close()
    with pytest.raises(ConfigError, match="newer version"):
        async with open_store():
            pass


async def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=f"{tmp_path}/file/data cannot be written"):
        async with open_state(f"embedded://{tmp_path}/file/data/state.db"):
            pass
