"""Reports that say no more than how many sessions run are told apart, and folded to the same view."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from services.controller.cluster_view.events import LoadReported, NodeReported
from services.controller.cluster_view.fold import fold
from services.controller.cluster_view.index import index_of
from services.controller.cluster_view.load_report import narrowed
from services.controller.cluster_view.view import Node, Phase, View
from stoker.ids import NodeId, ReplicaId
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


@pytest.mark.parametrize(
    "node",
    [
        reported(BUSY),
        reported(BUSY, OTHER, a_replica("r3", "m1", devices=(2,))),
        reported(replace(BUSY, phase=Phase.FAILED), OTHER),
        reported(BUSY, OTHER, warm_workers=7),
        reported(BUSY, OTHER, draining=True),
    ],
    ids=["a replica went", "one came", "one failed", "a worker more", "it drains"],
)
def test_a_report_of_anything_else_is_folded_whole(node: Node) -> None:
    assert narrowed(known(), node) is None


def test_a_node_that_was_cut_off_reports_whole() -> None:
    view = known()
    lost = replace(view.nodes[NodeId("n")], connected=False)
    view = replace(view, nodes={NodeId("n"): lost}, index=None)

    assert narrowed(view, reported(BUSY, OTHER)) is None
    assert fold(view, LoadReported(node_id=NodeId("n"), replicas=(BUSY,), seen_seconds=9.0)) == view


def test_a_load_report_makes_the_view_of_the_whole_one() -> None:
    narrow = fold(known(), NodeReported(node=reported(BUSY, OTHER)))
    detour = fold(known(), NodeReported(node=reported(BUSY, OTHER, warm_workers=7)))
    whole = fold(detour, NodeReported(node=reported(BUSY, OTHER)))

    assert replace(narrow, room=0) == replace(whole, room=0)
    assert index_of(narrow) == index_of(whole)
    assert narrow.nodes[NodeId("n")].replicas[ReplicaId("r1")].waiting_since_seconds == 9.0
