"""The protocol's values as etcd's messages and back; pure.

Keys get the prefix of the store's URL in front, so that several clusters share one etcd.
"""

from __future__ import annotations

from itertools import groupby
from typing import TYPE_CHECKING, Any

from etcd3aio import _protobuf as pb

from stoker.state.protocol import (
    NO_LEASE,
    Change,
    Changes,
    Compare,
    CreateRevisionIs,
    Delete,
    Deleted,
    LeaseId,
    ModRevisionIs,
    Put,
    Stored,
    ValueIs,
    Versioned,
    Write,
    holds,
)
from stoker.state.tables import prefix_end

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

DELETE_EVENT = 1
"""mvccpb.Event.EventType.DELETE."""
ALL_KEYS = b"\0"
"""As range end: no end. As key: the first key there can be."""


class Keyspace:
    """Where in etcd the state lies.

    Args:
        prefix: In front of every key; empty, or ends with `/`.
    """

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix.encode()

    def key(self, key: str) -> bytes:
        """Return etcd's key."""
        return self._prefix + key.encode()

    def range(self, prefix: str) -> tuple[bytes, bytes]:
        """Return first key and end of all keys under a prefix."""
        whole = self.key(prefix)
        return whole or ALL_KEYS, prefix_end(whole) or ALL_KEYS

    def versioned(self, kv: Any) -> Versioned:
        """Return what a `KeyValue` says."""
        return Versioned(
            key=self._name(kv.key),
            value=kv.value,
            create_revision=kv.create_revision,
            mod_revision=kv.mod_revision,
            lease_id=LeaseId(kv.lease) if kv.lease else NO_LEASE,
        )

    def transaction(self, compares: Sequence[Compare], writes: Sequence[Write]) -> Any:
        """Return the request; where it fails it reads every compared key, in the order of `compared_keys`."""
        return pb.TxnRequest(
            compare=[self._compare(compare) for compare in compares],
            success=[self._write(write) for write in writes],
            failure=[
                pb.RequestOp(request_range=pb.RangeRequest(key=self.key(key)))
                for key in compared_keys(compares)
            ],
        )

    def found(self, compares: Sequence[Compare], responses: Iterable[Any]) -> dict[str, Versioned | None]:
        """Return what a failed transaction read."""
        ranges = (response.response_range for response in responses)
        return {
            key: self.versioned(answer.kvs[0]) if answer.kvs else None
            for key, answer in zip(compared_keys(compares), ranges, strict=True)
        }

    def changes(self, events: Iterable[Any], *, after_revision: int) -> tuple[Changes, ...]:
        """Group a watch's events into whole revisions, without those the caller knows already."""
        later = (event for event in events if event.kv.mod_revision > after_revision)
        return tuple(
            Changes(
                revision=revision,
                changes=tuple(sorted(map(self._change, group), key=lambda change: change.key)),
            )
            for revision, group in groupby(later, key=lambda event: int(event.kv.mod_revision))
        )

    def _name(self, key: bytes) -> str:
        return key[len(self._prefix) :].decode()

    def _change(self, event: Any) -> Change:
        if event.type == DELETE_EVENT:
            return Deleted(key=self._name(event.kv.key), revision=event.kv.mod_revision)
        return Stored(item=self.versioned(event.kv))

    def _compare(self, compare: Compare) -> Any:
        key = self.key(compare.key)
        match compare:
            case ModRevisionIs(revision=revision):
                return pb.Compare(target=pb.Compare.MOD, key=key, mod_revision=revision)
            case CreateRevisionIs(revision=revision):
                return pb.Compare(target=pb.Compare.CREATE, key=key, create_revision=revision)
            case ValueIs(value=value):
                return pb.Compare(target=pb.Compare.VALUE, key=key, value=value)

    def _write(self, write: Write) -> Any:
        match write:
            case Put(key=key, value=value, lease_id=lease_id):
                put = pb.PutRequest(key=self.key(key), value=value, lease=lease_id)
                return pb.RequestOp(request_put=put)
            case Delete(key=key):
                return pb.RequestOp(request_delete_range=pb.DeleteRangeRequest(key=self.key(key)))


def compared_keys(compares: Sequence[Compare]) -> tuple[str, ...]:
    """Return each compared key once, in order."""
    return tuple(dict.fromkeys(compare.key for compare in compares))


def failed(compares: Sequence[Compare], found: dict[str, Versioned | None]) -> tuple[Compare, ...]:
    """Return the compares that did not hold."""
    return tuple(compare for compare in compares if not holds(compare, found[compare.key]))
