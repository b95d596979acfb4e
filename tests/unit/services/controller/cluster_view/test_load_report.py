"""Reports that say no more than how many sessions run are told apart, and folded to the same view."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.controller.cluster_view.events import LoadReported, NodeReported
from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.load_report import narrowed
from services.controller.cluster_view.view import Node, Phase, Stage, View
from stoker.ids import NodeId, ReplicaId
from stoker.units import GB
from tests.unit.services.controller.builders import a_model, a_node, a_replica, a_reservation, a_view

IDLE = a_replica("r1", "m1", idle_since_seconds=4.0)
OTHER = a_replica("r2", "m2", devices=(1,), idle_since_seconds=4.0)
BUSY = replace(IDLE, sessions=2, waiting_sessions=1, context_tokens=70, idle_since_seconds=None)


def reported(*replicas: Any, seen: float = 9.0, **changes: Any) -> Node:
    return replace(a_node("n", replicas=replicas or (IDLE, OTHER), last_seen_seconds=seen), **changes)


def known() -> View:
    view = a_view(
        models=(a_model("m1"), a_model("m2")),
        reservations=(a_reservation("r1", "m1", "n"), a_reservation("r2", "m2", "n", devices=(1,))),
    )
    return fold(view, NodeReported(node=reported(seen=5.0)))


def test_a_report_of_other_sessions_names_the_replicas_that_have_them() -> None:
    told = narrowed(known(), reported(BUSY, OTHER))

    assert told == LoadReported(node_id=NodeId("n"), replicas=(BUSY,), seen_seconds=9.0)


def test_a_report_that_says_nothing_new_is_a_sign_of_life() -> None:
    told = narrowed(known(), reported())

    assert told == LoadReported(node_id=NodeId("n"), replicas=(), seen_seconds=9.0)
    assert fold(known(), NodeReported(node=reported())).nodes[NodeId("n")].last_seen_seconds == 9.0


def test_a_report_of_bytes_that_wait_before_a_stage_says_no_more_than_that() -> None:
    stages = known().nodes[NodeId("n")].stages
    waiting = {name: replace(stage, queued_bytes=7) for name, stage in stages.items()}
    told = narrowed(known(), reported(stages=waiting))

    assert told is not None
    assert told.queued_bytes == dict.fromkeys(waiting, 7)
    assert fold(known(), told).nodes[NodeId("n")].stages == waiting


@pytest.mark.parametrize(
    "node",
    [
        reported(BUSY),
        reported(BUSY, OTHER, a_replica("r3", "m1", devices=(2,))),
        reported(replace(BUSY, phase=Phase.FAILED), OTHER),
        reported(BUSY, OTHER, warm_workers=7),
        reported(BUSY, OTHER, draining=True),
        reported(BUSY, OTHER, stages={"disk": Stage(bytes_per_second=7.0)}),
        reported(BUSY, OTHER, stages={}),
    ],
    ids=["a replica went", "one came", "one failed", "a worker more", "it drains", "a rate", "a stage went"],
)
def test_a_report_of_anything_else_is_folded_whole(node: Node) -> None:
    assert narrowed(known(), node) is None


def test_a_node_that_was_cut_off_reports_whole() -> None:
    view = known()
    lost = replace(view.nodes[NodeId("n")], connected=False)
    view = replace(view, nodes={NodeId("n"): lost}, index=None)

    assert narrowed(view, reported(BUSY, OTHER)) is None
    assert fold(view, LoadReported(node_id=NodeId("n"), replicas=(BUSY,), seen_seconds=9.0)) == view


@pytest.mark.parametrize("queued_bytes", [0, 7 * GB])
def test_a_load_report_makes_the_view_of_the_whole_one(queued_bytes: int) -> None:
    """The second replica is idle: what it is worth depends on what waits there."""
    stages = {"disk": Stage(bytes_per_second=GB, queued_bytes=queued_bytes)}
    narrow = fold(known(), NodeReported(node=reported(BUSY, OTHER, stages=stages)))
    detour = fold(known(), NodeReported(node=reported(BUSY, OTHER, warm_workers=7)))
    whole = fold(detour, NodeReported(node=reported(BUSY, OTHER, stages=stages)))

    assert replace(narrow, room=0) == replace(whole, room=0)
    assert index_of(narrow) == index_of(whole)
    assert narrow.nodes[NodeId("n")].replicas[ReplicaId("r1")].waiting_since_seconds == 9.0


def longest(view: View) -> tuple[float | None, float | None]:
    """Return since when somebody has waited at r1: for anything, and as it was seen here."""
    replica = view.nodes[NodeId("n")].replicas[ReplicaId("r1")]
    return replica.longest_since_seconds, replica.waiting_since_seconds


def waiting(since: float | None, seen: float, **changes: Any) -> Node:
    return reported(replace(BUSY, longest_since_seconds=since), OTHER, seen=seen, **changes)


@pytest.mark.parametrize("workers", [1, 7], ids=["folded as a load", "folded whole"])
def test_the_longest_wait_is_when_it_began_wherever_that_was(workers: int) -> None:
    first = fold(known(), NodeReported(node=waiting(-140.0, 9.0, warm_workers=workers)))
    assert longest(first) == (-140.0, 9.0)

    served = fold(first, NodeReported(node=waiting(-90.0, 11.0, warm_workers=workers)))
    assert longest(served) == (-90.0, 9.0)

    idle = fold(served, NodeReported(node=reported(IDLE, OTHER, seen=12.0, warm_workers=workers)))
    assert longest(idle) == (None, None)


@pytest.mark.parametrize("workers", [1, 7], ids=["folded as a load", "folded whole"])
def test_a_wait_told_again_a_moment_off_is_the_same(workers: int) -> None:
    first = fold(known(), NodeReported(node=waiting(-140.0, 9.0, warm_workers=workers)))

    for off in (0.04, 0.09, -0.09):  # none adds to the one before
        first = fold(first, NodeReported(node=waiting(-140.0 + off, 10.0, warm_workers=workers)))
        assert longest(first) == (-140.0, 9.0)


def test_an_agent_that_tells_no_wait_is_believed_as_it_was_seen() -> None:
    assert longest(fold(known(), NodeReported(node=waiting(None, 9.0)))) == (None, 9.0)


def test_a_new_leader_knows_how_long_somebody_has_waited() -> None:
    view = a_view(models=(a_model("m1"), a_model("m2")), reservations=(a_reservation("r1", "m1", "n"),))

    assert longest(fold(view, NodeReported(node=waiting(-140.0, 9.0)))) == (-140.0, 9.0)


def test_who_computed_once_has_served_whatever_is_reported_later() -> None:
    node_id, replica_id = NodeId("n"), ReplicaId("r1")
    served = []
    view = known()
    for replica in (replace(BUSY, sessions=1), BUSY, IDLE):  # it waits; another one is computed for; all end
        view = fold(view, NodeReported(node=reported(replica, OTHER)))
        served.append(view.nodes[node_id].replicas[replica_id].has_served)
    view = fold(view, NodeReported(node=reported(replace(IDLE, max_batch=3), OTHER)))  # a whole report
    served.append(view.nodes[node_id].replicas[replica_id].has_served)

    assert served == [False, True, True, True]
