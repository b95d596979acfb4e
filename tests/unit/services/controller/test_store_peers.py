"""Every store learns of every other one, once."""

from __future__ import annotations

from services.controller.store_peers import StorePeers
from stoker.ids import NodeId
from stoker.v1.checkpoint_store_pb2 import StoreStatus
from stoker.v1.node_agent_pb2 import NodeReport


def report(node_id: str, peer_address: str | None) -> NodeReport:
    """A node's report; None = its store cannot be reached."""
    store = None if peer_address is None else StoreStatus(peer_address=peer_address)
    return NodeReport(node_id=node_id, store=store)


def peers_of(*reports: NodeReport) -> StorePeers:
    """What is known after these reports."""
    made = StorePeers()
    for each in reports:
        made.reported(each)
    return made


def test_a_node_is_told_of_all_stores_but_its_own():
    made = peers_of(report("a", "a:1"), report("c", "c:1"), report("b", "b:1"))

    assert list(made.others(NodeId("b")).addresses) == ["a:1", "c:1"]


def test_a_store_that_shares_nothing_is_not_named():
    assert not peers_of(report("a", "")).others(NodeId("b")).addresses


def test_the_same_report_again_changes_nothing():
    made = peers_of(report("a", "a:1"))
    before = made.version
    made.reported(report("a", "a:1"))

    assert made.version == before


def test_a_store_that_moves_is_named_where_it_is_now():
    made = peers_of(report("a", "a:1"))
    before = made.version
    made.reported(report("a", "a:2"))

    assert made.version > before
    assert list(made.others(NodeId("b")).addresses) == ["a:2"]


def test_a_store_that_is_away_for_a_moment_stays_named_until_its_node_leaves():
    made = peers_of(report("a", "a:1"), report("a", None))
    assert list(made.others(NodeId("b")).addresses) == ["a:1"]

    made.disconnected(NodeId("a"))
    assert not made.others(NodeId("b")).addresses
