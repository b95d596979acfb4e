"""etcd's messages and the protocol's values say the same."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
from etcd3aio import _protobuf as pb

from stoker.state import Changes, Deleted, LeaseId, Stored, Versioned, absent
from stoker.state.etcd_wire import DELETE_EVENT, Keyspace
from stoker.state.tables import prefix_end


def event(key: bytes, revision: int, *, deleted: bool = False) -> Any:
    """Build a watch's event."""
    from etcd.api.mvccpb import kv_pb2  # type: ignore[import-not-found] # etcd3aio puts it on the path

    kv = kv_pb2.KeyValue(key=key, value=b"v", create_revision=1, mod_revision=revision, lease=5)
    return kv_pb2.Event(type=DELETE_EVENT if deleted else 0, kv=kv)


@pytest.mark.parametrize("first", ["stoker.v1.controller_pb2", "etcd3aio"])
def test_etcds_messages_and_ours_live_in_one_process(first: str) -> None:
    importlib.import_module(first)
    from stoker.v1 import controller_pb2

    assert pb.TxnRequest.DESCRIPTOR.full_name == "etcdserverpb.TxnRequest"
    assert controller_pb2.DESCRIPTOR.package == "stoker.v1"


def test_events_are_grouped_into_whole_transactions_without_those_known() -> None:
    events = [
        event(b"s/known", 4),
        event(b"s/b", 5),
        event(b"s/a", 5, deleted=True),
        event(b"s/c", 7),
    ]

    def stored(key: str, revision: int) -> Stored:
        return Stored(
            item=Versioned(key=key, value=b"v", create_revision=1, mod_revision=revision, lease_id=LeaseId(5))
        )

    assert Keyspace("s/").changes(events, after_revision=4) == (
        Changes(revision=5, changes=(Deleted(key="a", revision=5), stored("b", 5))),
        Changes(revision=7, changes=(stored("c", 7),)),
    )


def test_a_failed_transaction_reads_each_compared_key_once() -> None:
    request = Keyspace("s/").transaction([absent("a"), absent("b"), absent("a")], [])

    assert [operation.request_range.key for operation in request.failure] == [b"s/a", b"s/b"]


@pytest.mark.parametrize(
    ("prefix", "end"), [(b"a/", b"a0"), (b"a\xff", b"b"), (b"", None), (b"\xff\xff", None)]
)
def test_the_end_of_a_prefix_is_the_first_key_after_it(prefix: bytes, end: bytes | None) -> None:
    assert prefix_end(prefix) == end
