"""What a start teaches its node, and what nodes and models that have shown nothing take from the others."""

from __future__ import annotations

from dataclasses import replace

import pytest

from services.controller.cluster_view.estimate import (
    bytes_per_second,
    opening_seconds,
    worker_wait_seconds,
)
from services.controller.cluster_view.events import ModelPut, NodeReported
from services.controller.cluster_view.fold import fold_all
from services.controller.cluster_view.learnt import StartStages, Transferred
from services.controller.cluster_view.lessons import parts_like
from services.controller.cluster_view.view import Node, Phase, Stage, View
from stoker.units import GB, MB
from tests.unit.services.controller.builders import NOW_SECONDS, a_model, a_node, a_replica

LOADED = StartStages(
    skeleton_seconds=0.3,
    first_forward_seconds=0.1,
    weights_seconds=2.0,
    total_seconds=2.5,
    transfers=(Transferred(tier="disk", bytes=100 * MB, seconds=2.0),),
)


def node(name: str, **changes: object) -> Node:
    return a_node(name, **{"stages": {}, **changes})  # type: ignore[arg-type]


def start(name: str, stages: StartStages = LOADED, *others: str) -> list[NodeReported]:
    """A replica of `m` starts on a node, beside `others` that start, too."""
    starting = a_replica(phase=Phase.STARTING, idle_since_seconds=None, ready_since_seconds=None)
    beside = tuple(replace(starting, replica_id=other) for other in others)  # type: ignore[arg-type]
    ready = replace(starting, phase=Phase.READY, stages=stages)
    return [
        NodeReported(node=node(name, replicas=(starting, *beside))),
        NodeReported(node=node(name, replicas=(ready, *beside))),
    ]


def taught(*events: object) -> View:
    return fold_all(View(), [ModelPut(model=a_model(layers=10)), *events])  # type: ignore[list-item]


def test_a_start_teaches_its_node_the_rate_of_its_disk_at_once() -> None:
    view = taught(*start("a"))

    assert bytes_per_second(view.nodes["a"], "disk") == pytest.approx(50 * MB)  # type: ignore[index]


def test_what_the_page_cache_gave_is_a_part_of_what_the_disk_gives() -> None:
    parts = (
        Transferred(tier="disk", bytes=20 * MB, seconds=1.0),
        Transferred(tier="page_cache", bytes=80 * MB, seconds=2.0),
    )

    view = taught(*start("a", replace(LOADED, transfers=parts)))

    assert bytes_per_second(view.nodes["a"], "disk") == pytest.approx(50 * MB)  # type: ignore[index]


def test_loads_that_share_a_stage_teach_nothing() -> None:
    view = taught(*start("a", LOADED, "other"))

    assert bytes_per_second(view.nodes["a"], "disk") == 1.0 * GB  # type: ignore[index]


def test_a_new_node_counts_on_the_others_until_its_store_or_its_own_starts_say_more() -> None:
    view = taught(*start("a"), NodeReported(node=node("b")))
    told = NodeReported(node=node("b", stages={"disk": Stage(bytes_per_second=7 * MB)}))

    assert bytes_per_second(view.nodes["b"], "disk") == pytest.approx(50 * MB)  # type: ignore[index]
    assert bytes_per_second(fold_all(view, [told]).nodes["b"], "disk") == 7 * MB  # type: ignore[index]
    own = fold_all(
        view,
        [told, *start("b", replace(LOADED, transfers=(Transferred(tier="disk", bytes=GB, seconds=1.0),)))],
    )
    assert bytes_per_second(own.nodes["b"], "disk") == pytest.approx(GB)  # type: ignore[index]


def test_a_model_that_was_never_started_is_taken_to_start_like_the_others() -> None:
    view = taught(*start("a"))

    parts = parts_like(view, a_model("new", layers=10))

    assert parts.skeleton_seconds == pytest.approx(0.3)
    assert parts.first_forward_seconds == pytest.approx(0.1)
    assert parts.overhead_seconds == pytest.approx(0.5)


def test_what_starts_from_afar_take_longer_is_the_opening_of_their_checkpoints() -> None:
    far = replace(
        LOADED, total_seconds=3.5, transfers=(Transferred(tier="remote", bytes=100 * MB, seconds=2.0),)
    )

    view = taught(*start("a"), *start("b", far), NodeReported(node=node("c")))

    assert opening_seconds(view.nodes["c"], "remote") == pytest.approx(1.0)  # type: ignore[index]
    assert opening_seconds(view.nodes["c"], "disk") == 0.0  # type: ignore[index]
    assert view.fleet.typical is not None
    assert view.fleet.typical[2] == pytest.approx(0.5)


def test_an_order_waits_for_the_rest_of_a_workers_start_that_is_under_way() -> None:
    known = a_node(warm_workers=0, worker_start_seconds=6.0, next_worker_seconds=2.0)

    assert worker_wait_seconds(replace(known, warm_workers=1), 0) == 0.0
    assert worker_wait_seconds(known, 0) == 2.0
    assert worker_wait_seconds(known, 1) == 6.0
    assert worker_wait_seconds(replace(known, next_worker_seconds=0.0), 0) == 6.0


def test_now_is_only_used_to_age_what_was_learnt() -> None:
    assert taught(*start("a")).fleet.rates["disk"].at_seconds == NOW_SECONDS


def test_before_any_start_what_one_store_says_of_its_disk_stands_for_the_others_too() -> None:
    probed = node("a", stages={"disk": Stage(bytes_per_second=40 * MB)})
    view = taught(NodeReported(node=probed), NodeReported(node=node("b")))

    assert bytes_per_second(view.nodes["b"], "disk") == pytest.approx(40 * MB)  # type: ignore[index]


def test_what_a_store_said_counts_for_nothing_once_a_start_has_shown_it() -> None:
    probed = node("c", stages={"disk": Stage(bytes_per_second=4 * GB)})
    view = taught(NodeReported(node=probed), *start("a"), NodeReported(node=node("b")))

    assert bytes_per_second(view.nodes["b"], "disk") == pytest.approx(50 * MB)  # type: ignore[index]
