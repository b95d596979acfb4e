"""The state protocol: what every backend offers, as values.

Rules every backend keeps (and the one suite proves):

1. One counter, the *revision*, orders all writes. A transaction that changes something gets the next one;
   all its writes carry it. Reads and failed or empty transactions leave it alone.
2. `transact` is atomic and linearizable: all compares hold and all writes happen, or nothing does.
3. A watch delivers every later transaction that touches its prefix once, whole, in order. Where history was
   compacted meanwhile, it says so with `Resync` and goes on from there: nothing is skipped in silence.
4. Keys attached to a lease are deleted, in one revision, when the lease expires or is revoked.

Keys are text, `/` separates by convention only; values are bytes, at most `MAX_TRANSACTION_BYTES` a
transaction. Lists and watches take a *prefix*: plain text, so `node/` and not `node` for a folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, NewType, Protocol

from stoker.errors import InvalidRequest

if TYPE_CHECKING:
    from collections.abc import AsyncGenerator, Mapping, Sequence

    from stoker.state.leases import Lease

LeaseId = NewType("LeaseId", int)

NO_LEASE = LeaseId(0)
ABSENT = 0
"""The revision of a key that does not exist."""

DEFAULT_TIMEOUT_SECONDS = 5.0
MAX_TRANSACTION_OPERATIONS = 128
"""Compares, and writes, in one transaction: etcd's own default limit (`--max-txn-ops`)."""
MAX_TRANSACTION_BYTES = 1_000_000
"""Keys and values of one transaction together: two thirds of etcd's default limit for a request (1.5 MiB)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Versioned:
    """A key as it stands.

    Attributes:
        key: The key.
        value: Its value.
        create_revision: The revision that created the key (a deleted key starts anew).
        mod_revision: The revision that wrote it last: what compare-and-swap compares.
        lease_id: The lease it lives on; `NO_LEASE` for none.
    """

    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: LeaseId = NO_LEASE


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All keys under a prefix, sorted by key, as of one revision.

    Attributes:
        revision: Watch after this one to miss nothing.
        items: The keys.
    """

    revision: int
    items: tuple[Versioned, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ModRevisionIs:
    """Holds while the key's last write is `revision`; `ABSENT` holds while there is no such key."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CreateRevisionIs:
    """Holds while the key exists and was created by `revision`, however often it was written since."""

    key: str
    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ValueIs:
    """Holds while the key exists and has this value."""

    key: str
    value: bytes


Compare = ModRevisionIs | CreateRevisionIs | ValueIs


@dataclass(frozen=True, slots=True, kw_only=True)
class Put:
    """Write a key; it belongs to `lease_id` from then on, to no lease where that is `NO_LEASE`."""

    key: str
    value: bytes
    lease_id: LeaseId = NO_LEASE


@dataclass(frozen=True, slots=True, kw_only=True)
class Delete:
    """Delete a key; nothing happens where there is none."""

    key: str


Write = Put | Delete


@dataclass(frozen=True, slots=True, kw_only=True)
class Committed:
    """All compares held and all writes happened.

    Attributes:
        revision: The revision of the writes; the store's current one where nothing changed.
    """

    revision: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Conflict:
    """At least one compare did not hold and nothing was written.

    Attributes:
        revision: The store's revision at that moment.
        failed: The compares that did not hold.
        found: Every compared key as it stood, None where it does not exist: enough to decide again without
            another read.
    """

    revision: int
    failed: tuple[Compare, ...]
    found: Mapping[str, Versioned | None] = field(default_factory=lambda: MappingProxyType({}))


Outcome = Committed | Conflict


def absent(key: str) -> Compare:
    """Return the compare that holds while there is no such key."""
    return ModRevisionIs(key=key, revision=ABSENT)


def unchanged(item: Versioned) -> Compare:
    """Return the compare that holds while nobody has written or deleted this key since."""
    return ModRevisionIs(key=item.key, revision=item.mod_revision)


def holds(compare: Compare, item: Versioned | None) -> bool:
    """Decide a compare against its key as it stands; None where the key does not exist."""
    match compare:
        case ModRevisionIs(revision=revision):
            return revision == (item.mod_revision if item else ABSENT)
        case CreateRevisionIs(revision=revision):
            return revision == (item.create_revision if item else ABSENT)
        case ValueIs(value=value):
            return item is not None and item.value == value


def check_transaction(compares: Sequence[Compare], writes: Sequence[Write]) -> None:
    """Refuse what not every backend can do.

    Raises:
        InvalidRequest: Too many operations or bytes, an empty key, or one key written twice.
    """
    if max(len(compares), len(writes)) > MAX_TRANSACTION_OPERATIONS:
        raise InvalidRequest(
            f"transaction has {len(compares)} compares and {len(writes)} writes; at most "
            f"{MAX_TRANSACTION_OPERATIONS} of each fit: split it"
        )
    if not all(operation.key for operation in (*compares, *writes)):
        raise InvalidRequest("transaction names an empty key")
    written = [write.key for write in writes]
    if len(set(written)) != len(written):
        twice = sorted({key for key in written if written.count(key) > 1})
        raise InvalidRequest(f"transaction writes {', '.join(twice)} twice: only the last write can be meant")
    size_bytes = sum(len(operation.key.encode()) for operation in (*compares, *writes)) + sum(
        len(operation.value) for operation in (*compares, *writes) if isinstance(operation, (ValueIs, Put))
    )
    if size_bytes > MAX_TRANSACTION_BYTES:
        raise InvalidRequest(
            f"transaction holds {size_bytes} bytes, at most {MAX_TRANSACTION_BYTES} fit: keep large data "
            "elsewhere"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A key was written; `item.mod_revision` says by which revision."""

    item: Versioned

    @property
    def key(self) -> str:
        """The key written."""
        return self.item.key


@dataclass(frozen=True, slots=True, kw_only=True)
class Deleted:
    """A key was deleted, by a transaction or by the end of its lease."""

    key: str
    revision: int


Change = Stored | Deleted


@dataclass(frozen=True, slots=True, kw_only=True)
class Changes:
    """What one revision changed under the watched prefix: whole transactions, never halves.

    Attributes:
        revision: Resume a watch after this one.
        changes: In the order of their keys within the transaction; never empty.
    """

    revision: int
    changes: tuple[Change, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Resync:
    """Forget what was known of the prefix: this is how it stands now. `Changes` go on after it."""

    snapshot: Snapshot

    @property
    def revision(self) -> int:
        """Resume a watch after this one."""
        return self.snapshot.revision


WatchEvent = Changes | Resync


class StateStore(Protocol):
    """The cluster's state, as one backend offers it; get one from `stoker.state.open_state`.

    Every call but `watch` ends within `timeout_seconds`, with `StateUnavailable` if need be.
    """

    async def get(self, key: str, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Versioned | None:
        """Return the key as it stands, None where it does not exist; linearizable.

        Raises:
            StateUnavailable: No answer in time.
        """
        ...

    async def list(self, prefix: str, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Snapshot:
        """Return all keys that start with `prefix` (all keys for the empty one), as of one revision.

        Raises:
            StateUnavailable: No answer in time.
        """
        ...

    async def transact(
        self,
        compares: Sequence[Compare],
        writes: Sequence[Write],
        *,
        timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS,
    ) -> Outcome:
        """Write everything if every compare holds, else nothing.

        Never tried twice: a commit whose answer got lost would look like a conflict.

        Raises:
            InvalidRequest: See `check_transaction`.
            LeaseLost: A `Put` names a lease that is over; nothing was written.
            StateUnavailable: No answer in time; the writes may have happened or not.
        """
        ...

    def watch(self, prefix: str, *, after_revision: int | None = None) -> AsyncGenerator[WatchEvent, None]:
        """Iterate over what happens to keys under `prefix`, for as long as the caller likes.

        It outlives disconnections and restarts of the backend, waiting for as long as they take.

        Args:
            prefix: Which keys; all for the empty one.
            after_revision: The last revision the caller knows, of a snapshot or an event. None begins with a
                `Resync` that holds everything.

        Raises:
            StateUnavailable: The store was closed.
        """
        ...

    async def grant(self, ttl_seconds: float, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> Lease:
        """Return a new lease that lives for `ttl_seconds` (at least 1, rounded up to whole seconds).

        Raises:
            StateUnavailable: No answer in time.
        """
        ...

    async def renew(self, lease_id: LeaseId, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """Give the lease its whole time again, from now.

        Raises:
            LeaseLost: It is over.
            StateUnavailable: No answer in time.
        """
        ...

    async def revoke(self, lease_id: LeaseId, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """End the lease now and delete its keys; nothing happens where it is over.

        Raises:
            StateUnavailable: No answer in time.
        """
        ...

    async def compact(self, revision: int, *, timeout_seconds: float = DEFAULT_TIMEOUT_SECONDS) -> None:
        """Forget history up to and including `revision`; the keys as they stand remain.

        A watch that still needs what was forgotten gets a `Resync`. Nothing happens where it is forgotten.

        Raises:
            InvalidRequest: The revision lies in the future.
            StateUnavailable: No answer in time.
        """
        ...
