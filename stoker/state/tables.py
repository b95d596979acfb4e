"""The embedded state's SQLite file: synchronous, for the one thread that owns it.

Tables: `kv` holds the keys as they stand, `history` every change since the last compaction, `leases` who may
hold keys, `counters` the revision and how far history is compacted. Every write is one SQLite transaction in
WAL mode with `synchronous=FULL`: once `transact` returns, the write survives a power failure.
"""

from __future__ import annotations

import sqlite3
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import TYPE_CHECKING

from stoker.errors import ConfigError, InvalidRequest
from stoker.state.errors import LeaseLost
from stoker.state.protocol import (
    NO_LEASE,
    Change,
    Changes,
    Committed,
    Compare,
    Conflict,
    Deleted,
    LeaseId,
    Outcome,
    Put,
    Snapshot,
    Stored,
    Versioned,
    Write,
    holds,
)

if TYPE_CHECKING:
    from collections.abc import Generator, Iterable, Sequence

SCHEMA_VERSION = 1
SCHEMA = """
CREATE TABLE counters (name TEXT PRIMARY KEY, value INTEGER NOT NULL) WITHOUT ROWID;
INSERT INTO counters VALUES ('revision', 1), ('compacted', 1);
CREATE TABLE kv (
    key BLOB PRIMARY KEY, value BLOB NOT NULL, create_revision INTEGER NOT NULL,
    mod_revision INTEGER NOT NULL, lease_id INTEGER NOT NULL
) WITHOUT ROWID;
CREATE INDEX kv_by_lease ON kv (lease_id) WHERE lease_id != 0;
CREATE TABLE history (
    revision INTEGER NOT NULL, key BLOB NOT NULL, value BLOB, create_revision INTEGER NOT NULL,
    lease_id INTEGER NOT NULL, PRIMARY KEY (revision, key)
) WITHOUT ROWID;
CREATE TABLE leases (id INTEGER PRIMARY KEY AUTOINCREMENT, ttl_seconds INTEGER NOT NULL);
"""

DEFAULT_KEEP_REVISIONS = 10_000
"""History kept for watches that resume; older is compacted, a tenth of this at a time."""
MAX_REVISIONS_PER_READ = 256
"""How much history one read returns, so that a watch far behind doesn't hold the thread."""


@dataclass(frozen=True, slots=True, kw_only=True)
class History:
    """Part of what happened under a prefix.

    Attributes:
        upto_revision: Everything up to and including this revision is in `changes`; read on after it.
        changes: One per revision that touched the prefix, in order.
    """

    upto_revision: int
    changes: tuple[Changes, ...]


@dataclass(frozen=True, slots=True)
class Forgotten:
    """History does not reach back (or not forward) to the revision asked for."""


class Tables:
    """One open state file; belongs to the thread that made it.

    Args:
        path: The file, or `:memory:`.
        keep_revisions: How many revisions of history stay for watches.

    Raises:
        ConfigError: The file cannot be opened, is no state file, or is of a newer version.
    """

    def __init__(self, path: str, *, keep_revisions: int = DEFAULT_KEEP_REVISIONS) -> None:
        self._keep_revisions = keep_revisions
        with ExitStack() as undo:
            self._db = undo.enter_context(closing(_connect(path)))
            self._open(path)
            undo.pop_all()

    def close(self) -> None:
        """Close the file; everything committed is on disk already."""
        self._db.close()

    def get(self, key: str) -> Versioned | None:
        """Return the key as it stands."""
        row = self._db.execute(
            "SELECT key, value, create_revision, mod_revision, lease_id FROM kv WHERE key = ?",
            (key.encode(),),
        ).fetchone()
        return _versioned(row) if row else None

    def list(self, prefix: str) -> Snapshot:
        """Return all keys under the prefix."""
        rows = self._db.execute(
            "SELECT key, value, create_revision, mod_revision, lease_id FROM kv "
            "WHERE key >= ? AND (? IS NULL OR key < ?) ORDER BY key",
            _range(prefix),
        )
        return Snapshot(revision=self.revision, items=tuple(map(_versioned, rows)))

    def transact(self, compares: Sequence[Compare], writes: Sequence[Write]) -> Outcome:
        """Write everything if every compare holds, else nothing; see the protocol."""
        with self._transaction():
            found = {compare.key: self.get(compare.key) for compare in compares}
            failed = tuple(compare for compare in compares if not holds(compare, found[compare.key]))
            if failed:
                return Conflict(revision=self.revision, failed=failed, found=found)
            self._check_leases({write.lease_id for write in writes if isinstance(write, Put)})
            return Committed(revision=self._apply(writes))

    def history(self, prefix: str, *, after_revision: int) -> History | Forgotten:
        """Return the next part of what happened under the prefix after a revision."""
        if not self._compacted <= after_revision <= self.revision:
            return Forgotten()
        upto_revision = min(self.revision, after_revision + MAX_REVISIONS_PER_READ)
        rows = self._db.execute(
            "SELECT key, value, create_revision, revision, lease_id FROM history "
            "WHERE revision > ? AND revision <= ? AND key >= ? AND (? IS NULL OR key < ?) "
            "ORDER BY revision, key",
            (after_revision, upto_revision, *_range(prefix)),
        )
        return History(
            upto_revision=upto_revision,
            changes=tuple(
                Changes(revision=revision, changes=tuple(map(_change, group)))
                for revision, group in groupby(rows, key=lambda row: int(row[3]))
            ),
        )

    def leases(self) -> dict[LeaseId, float]:
        """Return every lease and its whole time in seconds."""
        rows = self._db.execute("SELECT id, ttl_seconds FROM leases")
        return {LeaseId(lease_id): float(ttl_seconds) for lease_id, ttl_seconds in rows}

    def grant(self, ttl_seconds: int) -> LeaseId:
        """Record a new lease; its number is never used again."""
        with self._transaction():
            cursor = self._db.execute("INSERT INTO leases (ttl_seconds) VALUES (?)", (ttl_seconds,))
        assert cursor.lastrowid is not None  # noqa: S101 - sqlite3 sets it after every INSERT
        return LeaseId(cursor.lastrowid)

    def revoke(self, lease_id: LeaseId) -> None:
        """Delete the lease and its keys, in one revision."""
        with self._transaction():
            self._db.execute("DELETE FROM leases WHERE id = ?", (lease_id,))
            keys = self._db.execute(
                "SELECT key FROM kv WHERE lease_id = ? AND lease_id != 0", (lease_id,)
            ).fetchall()
            self._record_deletions(bytes(key) for (key,) in keys)

    def compact(self, revision: int) -> None:
        """Forget history up to and including the revision."""
        if revision > self.revision:
            raise InvalidRequest(f"revision {revision} lies in the future: the state is at {self.revision}")
        if revision <= self._compacted:
            return
        with self._transaction():
            self._forget(revision)

    def _open(self, path: str) -> None:
        try:
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=FULL")
            self._create_if_empty(path)
            self.revision = self._counter("revision")
            self._compacted = self._counter("compacted")
        except sqlite3.Error as error:
            raise _unusable(path, error) from error

    def _create_if_empty(self, path: str) -> None:
        (version,) = self._db.execute("PRAGMA user_version").fetchone()
        if version > SCHEMA_VERSION:
            raise ConfigError(
                f"{path} was written by a newer version (layout {version}, this one knows {SCHEMA_VERSION}): "
                "run that version, or start with an empty data folder"
            )
        if version == 0:
            self._db.executescript(f"BEGIN;{SCHEMA}PRAGMA user_version={SCHEMA_VERSION};COMMIT;")

    def _counter(self, name: str) -> int:
        (value,) = self._db.execute("SELECT value FROM counters WHERE name = ?", (name,)).fetchone()
        return int(value)

    @contextmanager
    def _transaction(self) -> Generator[None, None, None]:
        """Commit at the end; on an error leave file and counters as they were."""
        before = self.revision, self._compacted
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            self.revision, self._compacted = before
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")
            raise

    def _check_leases(self, lease_ids: set[LeaseId]) -> None:
        for lease_id in lease_ids - {NO_LEASE}:
            if not self._db.execute("SELECT 1 FROM leases WHERE id = ?", (lease_id,)).fetchone():
                raise LeaseLost(f"lease {lease_id} is over: nothing was written; ask for a new one")

    def _apply(self, writes: Sequence[Write]) -> int:
        puts = [write for write in writes if isinstance(write, Put)]
        deletions = [write.key for write in writes if not isinstance(write, Put) and self.get(write.key)]
        if not puts:
            return self._record_deletions(key.encode() for key in deletions)
        revision = self._next_revision()
        for put in puts:
            existing = self.get(put.key)
            create_revision = existing.create_revision if existing else revision
            row = (put.key.encode(), put.value, create_revision, revision, put.lease_id)
            self._db.execute("INSERT OR REPLACE INTO kv VALUES (?, ?, ?, ?, ?)", row)
            self._db.execute(
                "INSERT INTO history (key, value, create_revision, revision, lease_id) "
                "VALUES (?, ?, ?, ?, ?)",
                row,
            )
        self._delete(revision, (key.encode() for key in deletions))
        return revision

    def _record_deletions(self, keys: Iterable[bytes]) -> int:
        """Delete existing keys in a revision of their own; without keys there is no new revision."""
        present = tuple(keys)
        if not present:
            return self.revision
        revision = self._next_revision()
        self._delete(revision, present)
        return revision

    def _delete(self, revision: int, keys: Iterable[bytes]) -> None:
        for key in keys:
            self._db.execute("DELETE FROM kv WHERE key = ?", (key,))
            self._db.execute("INSERT INTO history VALUES (?, ?, NULL, 0, 0)", (revision, key))

    def _next_revision(self) -> int:
        self.revision += 1
        self._db.execute("UPDATE counters SET value = ? WHERE name = 'revision'", (self.revision,))
        if self.revision - self._compacted > self._keep_revisions * 11 // 10:
            self._forget(self.revision - self._keep_revisions)
        return self.revision

    def _forget(self, revision: int) -> None:
        self._db.execute("DELETE FROM history WHERE revision <= ?", (revision,))
        self._db.execute("UPDATE counters SET value = ? WHERE name = 'compacted'", (revision,))
        self._compacted = revision


def _connect(path: str) -> sqlite3.Connection:
    try:
        return sqlite3.connect(path, isolation_level=None)
    except sqlite3.Error as error:
        raise _unusable(path, error) from error


def _unusable(path: str, error: sqlite3.Error) -> ConfigError:
    return ConfigError(
        f"{path} cannot be opened as a state file ({error}): restore it from a backup, or start with "
        "an empty data folder"
    )


def _versioned(row: tuple[bytes, bytes, int, int, int]) -> Versioned:
    key, value, create_revision, mod_revision, lease_id = row
    return Versioned(
        key=key.decode(),
        value=value,
        create_revision=create_revision,
        mod_revision=mod_revision,
        lease_id=LeaseId(lease_id),
    )


def _change(row: tuple[bytes, bytes | None, int, int, int]) -> Change:
    key, value, create_revision, revision, lease_id = row
    if value is None:
        return Deleted(key=key.decode(), revision=revision)
    return Stored(item=_versioned((key, value, create_revision, revision, lease_id)))


def _range(prefix: str) -> tuple[bytes, bytes | None, bytes | None]:
    """Return the first key of the prefix, and twice the first key after it, None where there is none."""
    end = prefix_end(prefix.encode())
    return prefix.encode(), end, end


def prefix_end(prefix: bytes) -> bytes | None:
    """Return the smallest key greater than every key with this prefix; None where every key is smaller."""
    stem = prefix.rstrip(b"\xff")
    return stem[:-1] + bytes([stem[-1] + 1]) if stem else None
