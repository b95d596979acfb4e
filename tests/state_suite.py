"""What every backend of `stoker.state` keeps: one suite, run against each of them.

A backend's test module derives from `StateSuite` and provides two fixtures: `open_store`, which opens the
same state each time it is called, and `time`, which lets its leases' time pass.
"""

# ruff: noqa: D102 - a test's name is its claim

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager, aclosing
from typing import TYPE_CHECKING, Protocol

import pytest

from stoker.errors import Fenced, InvalidRequest
from stoker.state import (
    ABSENT,
    NO_LEASE,
    Changes,
    Committed,
    Compare,
    Conflict,
    CreateRevisionIs,
    Delete,
    Deleted,
    FencedState,
    Leader,
    LeaseId,
    LeaseLost,
    ModRevisionIs,
    Put,
    Resync,
    Snapshot,
    StateStore,
    StateUnavailable,
    Stored,
    ValueIs,
    Versioned,
    WatchEvent,
    absent,
    campaign,
    observe,
    unchanged,
)

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator

TTL_SECONDS = 3
"""etcd lets no lease live for less than 2 s."""


class OpenStore(Protocol):
    """Opens the state under test."""

    def __call__(self) -> AbstractAsyncContextManager[StateStore]:
        """Open it; a second time opens the same state."""


class Time(Protocol):
    """The time that leases live by."""

    async def pass_seconds(self, seconds: float) -> None:
        """Let time pass, and whoever waits for it run."""


async def put(store: StateStore, key: str, value: bytes = b"v", *, lease_id: LeaseId = NO_LEASE) -> int:
    """Write one key and return the revision."""
    outcome = await store.transact([], [Put(key=key, value=value, lease_id=lease_id)])
    assert isinstance(outcome, Committed)
    return outcome.revision


async def existing(store: StateStore, key: str) -> Versioned:
    """Read a key that must exist."""
    item = await store.get(key)
    assert item is not None
    return item


async def following(events: AsyncGenerator[WatchEvent, None]) -> WatchEvent:
    """Return the next event of a watch, in bounded time."""
    async with asyncio.timeout(20):
        return await anext(events)


def flat(event: WatchEvent) -> list[tuple[str, bytes | None]]:
    """Return what changed: key and value, None where it was deleted."""
    assert isinstance(event, Changes)
    return [
        (change.key, change.item.value if isinstance(change, Stored) else None) for change in event.changes
    ]


class StateSuite:
    """Derive, and provide `open_store` and `time`."""

    async def test_a_key_that_was_never_written_is_absent(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            assert await store.get("a") is None

    async def test_a_key_keeps_the_revision_that_created_it_and_gets_that_of_each_write(
        self, open_store: OpenStore
    ) -> None:
        async with open_store() as store:
            first = await put(store, "a", b"1")
            second = await put(store, "a", b"2")

            assert await store.get("a") == Versioned(
                key="a", value=b"2", create_revision=first, mod_revision=second
            )
            assert second == first + 1

    async def test_a_key_that_was_deleted_starts_anew(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            await put(store, "a")
            await store.transact([], [Delete(key="a")])
            again = await put(store, "a")

            assert (await existing(store, "a")).create_revision == again

    @pytest.mark.parametrize("value", [b"", bytes(range(256)), "π".encode(), b"x" * 900_000])
    async def test_any_bytes_are_a_value(self, open_store: OpenStore, value: bytes) -> None:
        async with open_store() as store:
            await put(store, "π/ключ", value)

            assert (await existing(store, "π/ключ")).value == value

    async def test_all_writes_of_a_transaction_carry_one_revision(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            await put(store, "gone")
            outcome = await store.transact(
                [], [Put(key="a", value=b"1"), Delete(key="gone"), Put(key="b", value=b"2")]
            )
            snapshot = await store.list("")

        assert isinstance(outcome, Committed)
        assert snapshot.revision == outcome.revision
        assert [(item.key, item.mod_revision) for item in snapshot.items] == [
            ("a", outcome.revision),
            ("b", outcome.revision),
        ]

    async def test_one_compare_that_fails_leaves_everything_as_it_was(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            await put(store, "a", b"1")
            before = await store.list("")
            outcome = await store.transact(
                [ValueIs(key="a", value=b"1"), absent("a")], [Put(key="b", value=b""), Delete(key="a")]
            )

            assert isinstance(outcome, Conflict)
            assert await store.list("") == before

    async def test_a_conflict_says_what_failed_and_what_was_found(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            await put(store, "a", b"1")
            item = await existing(store, "a")
            compares = [unchanged(item), absent("a"), ModRevisionIs(key="none", revision=7)]
            outcome = await store.transact(compares, [Put(key="b", value=b"")])

        assert isinstance(outcome, Conflict)
        assert outcome.failed == (compares[1], compares[2])
        assert dict(outcome.found) == {"a": item, "none": None}
        assert outcome.revision == item.mod_revision

    async def test_compares_hold_for_what_they_name_and_nothing_else(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            created = await put(store, "a", b"1")
            written = await put(store, "a", b"2")
            expected: dict[Compare, bool] = {
                ModRevisionIs(key="a", revision=written): True,
                ModRevisionIs(key="a", revision=created): False,
                CreateRevisionIs(key="a", revision=created): True,
                CreateRevisionIs(key="a", revision=written): False,
                CreateRevisionIs(key="none", revision=ABSENT): True,
                ModRevisionIs(key="none", revision=ABSENT): True,
                ValueIs(key="a", value=b"2"): True,
                ValueIs(key="a", value=b"1"): False,
                ValueIs(key="none", value=b""): False,
            }
            held = {
                compare: isinstance(await store.transact([compare], []), Committed) for compare in expected
            }

        assert held == expected

    async def test_of_many_that_create_one_key_at_once_exactly_one_wins(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            outcomes = await asyncio.gather(
                *(
                    store.transact([absent("a")], [Put(key="a", value=str(number).encode())])
                    for number in range(50)
                )
            )
            winners = [number for number, outcome in enumerate(outcomes) if isinstance(outcome, Committed)]

            assert [str(number).encode() for number in winners] == [(await existing(store, "a")).value]

    async def test_concurrent_compare_and_swap_loses_no_increment(self, open_store: OpenStore) -> None:
        async def increment(store: StateStore) -> None:
            item: Versioned | None = await existing(store, "count")
            while item is not None:
                value = str(int(item.value) + 1).encode()
                outcome = await store.transact([unchanged(item)], [Put(key="count", value=value)])
                item = outcome.found["count"] if isinstance(outcome, Conflict) else None

        async with open_store() as store:
            await put(store, "count", b"0")
            await asyncio.gather(*(increment(store) for _ in range(20)))

            assert (await existing(store, "count")).value == b"20"

    async def test_a_list_holds_its_prefix_sorted_and_nothing_else(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            for key in ("n/b", "n/a", "n", "n0", "m/z", "n/é"):
                await put(store, key)

            assert [item.key for item in (await store.list("n/")).items] == ["n/a", "n/b", "n/é"]

    async def test_a_long_list_is_whole(self, open_store: OpenStore) -> None:
        keys = [f"k/{number:04}" for number in range(300)]
        async with open_store() as store:
            for start in range(0, 300, 100):
                await store.transact([], [Put(key=key, value=b"") for key in keys[start : start + 100]])
            snapshot = await store.list("k/")

        assert [item.key for item in snapshot.items] == keys

    async def test_transactions_that_change_nothing_leave_the_revision_alone(
        self, open_store: OpenStore
    ) -> None:
        async with open_store() as store:
            revision = await put(store, "a")
            outcomes = [
                await store.transact([], []),
                await store.transact([], [Delete(key="none")]),
                await store.transact([absent("a")], [Put(key="a", value=b"")]),
            ]

        assert [outcome.revision for outcome in outcomes] == [revision] * 3

    @pytest.mark.parametrize(
        ("writes", "why"),
        [
            ([Put(key=f"{number}", value=b"") for number in range(129)], "at most 128"),
            ([Put(key="a", value=b""), Delete(key="a")], "a twice"),
            ([Put(key="", value=b"")], "empty key"),
            ([Put(key="a", value=b"x" * 1_000_000)], "bytes"),
        ],
    )
    async def test_a_transaction_that_not_every_backend_can_do_is_refused(
        self, open_store: OpenStore, writes: list[Put | Delete], why: str
    ) -> None:
        async with open_store() as store:
            with pytest.raises(InvalidRequest, match=why):
                await store.transact([], writes)

    async def test_a_watch_without_a_revision_begins_with_everything(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            await put(store, "n/a")
            await put(store, "m/a")
            snapshot = await store.list("n/")
            async with aclosing(store.watch("n/")) as events:
                assert await following(events) == Resync(snapshot=snapshot)
                await put(store, "n/b", b"new")
                assert flat(await following(events)) == [("n/b", b"new")]

    async def test_a_watch_delivers_each_transaction_whole_and_in_order(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            start = await put(store, "n/0")
            async with aclosing(store.watch("n/", after_revision=start)) as events:
                await store.transact([], [Put(key="n/2", value=b"2"), Put(key="n/1", value=b"1")])
                await put(store, "m/else")
                await store.transact([], [Delete(key="n/1"), Put(key="n/0", value=b"3")])

                assert flat(await following(events)) == [("n/1", b"1"), ("n/2", b"2")]
                last = await following(events)
                assert flat(last) == [("n/0", b"3"), ("n/1", None)]
                assert last.revision == start + 3

    async def test_a_watch_resumes_after_the_revision_it_is_given(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            revisions = [await put(store, "a", str(number).encode()) for number in range(700)]
            for known in (0, 350, 698):
                async with aclosing(store.watch("a", after_revision=revisions[known])) as events:
                    seen = [(await following(events)).revision for _ in revisions[known + 1 :]]
                assert seen == revisions[known + 1 :]

    async def test_watches_do_not_disturb_each_other(self, open_store: OpenStore) -> None:
        async with open_store() as store, aclosing(store.watch("a")) as one:
            await following(one)
            async with aclosing(store.watch("a")) as other:
                await following(other)
            await put(store, "a", b"1")

            assert flat(await following(one)) == [("a", b"1")]

    async def test_a_watch_from_before_a_compaction_says_so_and_goes_on(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            old = await put(store, "n/a", b"1")
            await put(store, "n/a", b"2")
            await store.compact(await put(store, "n/b"))
            snapshot = await store.list("n/")
            async with aclosing(store.watch("n/", after_revision=old)) as events:
                assert await following(events) == Resync(snapshot=snapshot)
                await put(store, "n/c", b"3")
                assert flat(await following(events)) == [("n/c", b"3")]

    async def test_a_deletion_at_the_compacted_revision_is_not_skipped(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            known = await put(store, "n/a")
            outcome = await store.transact([], [Delete(key="n/a")])
            await store.compact(outcome.revision)
            await put(store, "n/b")
            async with aclosing(store.watch("n/", after_revision=known)) as events:
                event = await following(events)

        assert isinstance(event, Resync) or flat(event) == [("n/a", None)]

    async def test_a_watch_from_the_compacted_revision_needs_no_resync(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            known = await put(store, "n/a")
            await store.compact(known)
            await put(store, "n/b")
            async with aclosing(store.watch("n/", after_revision=known)) as events:
                assert flat(await following(events)) == [("n/b", b"v")]

    async def test_a_watch_from_a_revision_that_never_was_begins_anew(self, open_store: OpenStore) -> None:
        """So it is after the state was restored from an older copy."""
        async with open_store() as store:
            await put(store, "a")
            snapshot = await store.list("a")
            async with aclosing(store.watch("a", after_revision=snapshot.revision + 1000)) as events:
                assert await following(events) == Resync(snapshot=snapshot)

    async def test_compaction_of_the_future_is_refused_and_of_the_past_is_nothing(
        self, open_store: OpenStore
    ) -> None:
        async with open_store() as store:
            revision = await put(store, "a")
            await store.compact(revision)
            await store.compact(revision - 1)
            with pytest.raises(InvalidRequest, match="future"):
                await store.compact(revision + 1000)

    async def test_a_lease_that_expires_takes_its_keys_along_in_one_revision(
        self, open_store: OpenStore, time: Time
    ) -> None:
        async with open_store() as store:
            lease = await store.grant(TTL_SECONDS)
            await put(store, "n/stays")
            await put(store, "n/b", lease_id=lease.id)
            revision = await put(store, "n/a", lease_id=lease.id)
            async with aclosing(store.watch("n/", after_revision=revision)) as events:
                await time.pass_seconds(TTL_SECONDS)
                event = await following(events)

            assert event == Changes(
                revision=revision + 1,
                changes=(
                    Deleted(key="n/a", revision=revision + 1),
                    Deleted(key="n/b", revision=revision + 1),
                ),
            )
            assert [item.key for item in (await store.list("n/")).items] == ["n/stays"]

    async def test_a_revoked_lease_takes_its_keys_along_at_once(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            lease = await store.grant(TTL_SECONDS)
            await put(store, "a", lease_id=lease.id)
            await lease.revoke()
            await lease.revoke()

            assert await store.get("a") is None

    async def test_a_key_written_again_without_the_lease_outlives_it(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            lease = await store.grant(TTL_SECONDS)
            await put(store, "a", lease_id=lease.id)
            assert (await existing(store, "a")).lease_id == lease.id
            await put(store, "a")
            await lease.revoke()

            assert (await existing(store, "a")).lease_id == 0

    async def test_a_write_with_a_lease_that_is_over_changes_nothing(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            lease = await store.grant(TTL_SECONDS)
            await lease.revoke()
            with pytest.raises(LeaseLost):
                await store.transact(
                    [], [Put(key="b", value=b""), Put(key="a", value=b"", lease_id=lease.id)]
                )

            assert await store.list("") == Snapshot(revision=(await store.list("")).revision)

    async def test_a_lease_lives_while_it_is_kept_alive_and_no_longer(
        self, open_store: OpenStore, time: Time
    ) -> None:
        async with open_store() as store:
            lease = await store.grant(TTL_SECONDS)
            revision = await put(store, "a", lease_id=lease.id)
            async with aclosing(store.watch("a", after_revision=revision)) as events:
                async with lease.keep_alive():
                    await time.pass_seconds(1.5 * TTL_SECONDS)
                    assert await store.get("a") is not None
                await time.pass_seconds(TTL_SECONDS)

                assert flat(await following(events)) == [("a", None)]

    async def test_losing_the_lease_cancels_what_it_protects(self, open_store: OpenStore, time: Time) -> None:
        async with open_store() as store:
            lease = await store.grant(TTL_SECONDS)
            with pytest.raises(LeaseLost):  # noqa: PT012 - the block under the lease is what is tested
                async with asyncio.timeout(20), lease.keep_alive():
                    await store.revoke(lease.id)
                    await time.pass_seconds(TTL_SECONDS)
                    await asyncio.Event().wait()

    async def test_errors_under_a_lease_come_out_as_they_are(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            lease = await store.grant(TTL_SECONDS)
            with pytest.raises(KeyError, match="mine"):
                async with lease.keep_alive():
                    raise KeyError("mine")

    async def test_what_was_written_is_there_when_the_state_is_opened_again(
        self, open_store: OpenStore
    ) -> None:
        async with open_store() as store:
            revision = await put(store, "a", b"1")
            before = await store.list("")
        async with open_store() as store:
            assert await store.list("") == before
            assert await put(store, "b") == revision + 1
            async with aclosing(store.watch("", after_revision=revision)) as events:
                assert flat(await following(events)) == [("b", b"v")]

    async def test_a_closed_state_refuses_calls_and_ends_watches(self, open_store: OpenStore) -> None:
        async def wait_forever(events: AsyncGenerator[WatchEvent, None]) -> None:
            async for _ in events:
                pass

        async with open_store() as store:
            events = store.watch("a")
            await following(events)
            waiting = asyncio.create_task(wait_forever(events))
            await asyncio.sleep(0)
        with pytest.raises(StateUnavailable, match="closed"):
            await waiting
        with pytest.raises(StateUnavailable, match="closed"):
            await store.get("a")
        with pytest.raises(StateUnavailable, match="closed"):
            await store.transact([], [])

    async def test_one_candidate_leads_and_the_next_one_follows_in_a_later_term(
        self, open_store: OpenStore
    ) -> None:
        terms: list[tuple[bytes, int]] = []

        async def lead(store: StateStore, identity: bytes) -> None:
            async with campaign(store, "leader", identity=identity) as fenced:
                terms.append((identity, fenced.leader.term))
                assert len(leading) == 0
                leading.append(identity)
                await put(store, f"led/{identity.decode()}")
                leading.remove(identity)

        leading: list[bytes] = []
        async with open_store() as store, asyncio.timeout(20):
            await asyncio.gather(*(lead(store, identity) for identity in (b"a", b"b", b"c")))

        assert {identity for identity, _ in terms} == {b"a", b"b", b"c"}
        assert [term for _, term in terms] == sorted({term for _, term in terms})

    async def test_an_observer_sees_who_leads_and_that_nobody_does(self, open_store: OpenStore) -> None:
        async with open_store() as store, aclosing(observe(store, "leader")) as leaders:
            assert await anext(leaders) is None
            await put(store, "leader-not", b"somebody else's key")
            async with campaign(store, "leader", identity=b"a:1") as fenced:
                assert await anext(leaders) == Leader(identity=b"a:1", term=fenced.leader.term)
            assert await anext(leaders) is None

    async def test_a_leader_writes_while_its_term_lasts_and_is_fenced_after(
        self, open_store: OpenStore
    ) -> None:
        async with open_store() as store:
            async with campaign(store, "leader", identity=b"old") as old:
                assert isinstance(await old.transact([], [Put(key="a", value=b"old")]), Committed)
                conflict = await old.transact([absent("a")], [Put(key="a", value=b"")])
            async with campaign(store, "leader", identity=b"new") as new:
                with pytest.raises(Fenced, match="nothing was written"):
                    await old.transact([], [Put(key="a", value=b"zombie")])
                assert isinstance(await new.transact([], [Put(key="b", value=b"new")]), Committed)

            assert (await existing(store, "a")).value == b"old"
            assert isinstance(conflict, Conflict)
            assert set(conflict.found) == {"a"}

    async def test_a_leader_that_slept_through_its_lease_changes_nothing(
        self, open_store: OpenStore, time: Time
    ) -> None:
        """A paused process renews nothing; here it has no keep-alive to begin with."""
        async with open_store() as store:
            lease = await store.grant(TTL_SECONDS)
            term = await put(store, "leader", b"old", lease_id=lease.id)
            old = FencedState(store, election_key="leader", leader=Leader(identity=b"old", term=term))
            async with aclosing(observe(store, "leader")) as leaders:
                assert await anext(leaders) == old.leader
                await time.pass_seconds(TTL_SECONDS)
                assert await anext(leaders) is None
            with pytest.raises(Fenced):
                await old.transact([], [Put(key="a", value=b"zombie")])

            assert await store.get("a") is None

    async def test_a_leader_whose_key_is_taken_away_stops_leading(self, open_store: OpenStore) -> None:
        async with open_store() as store:
            with pytest.raises(Fenced, match="stops leading"):  # noqa: PT012 - the block is what is tested
                async with asyncio.timeout(20), campaign(store, "leader", identity=b"a"):
                    await store.transact([], [Delete(key="leader")])
                    await asyncio.Event().wait()
