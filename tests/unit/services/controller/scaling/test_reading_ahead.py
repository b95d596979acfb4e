"""What is read for models that wait for room: where, how many times, and at whose cost."""

from __future__ import annotations

from dataclasses import replace

from services.controller.cluster_view.demand import Demand, Refusal
from services.controller.cluster_view.view import Device, Held, Pool, View
from services.controller.scaling.reading_ahead import MAX_NODES, Reading, read_ahead
from stoker.ids import ModelName, NodeId
from stoker.units import GB
from tests.unit.services.controller.builders import (
    NOW_SECONDS,
    a_memory,
    a_model,
    a_node,
    a_replica,
    a_reservation,
    a_view,
)

CUDA = (Device(index=0, kind="cuda", memory_bytes=80 * GB),)


def waiting(*names: str, nodes: int = 3, waiters: int = 1, pool_bytes: int = 10 * GB) -> View:
    """Return nodes with all checkpoints on disk, and models that wait, the first one longest."""
    models = tuple(a_model(name, max_replicas=9, concurrency=1) for name in names)
    held = {model.checkpoint: Held(disk_bytes=GB) for model in models}
    pool = Pool(total_bytes=pool_bytes, free_bytes=pool_bytes)
    since = {model.name: NOW_SECONDS - 10 + place for place, model in enumerate(models)}
    return a_view(
        models=models,
        nodes=tuple(
            replace(a_node(f"n{index:02d}", held=held, pool=pool), devices=CUDA) for index in range(nodes)
        ),
        demands={name: Demand(since_seconds=at, waiters=waiters) for name, at in since.items()},
        refusals={name: Refusal(reason="no free room", at_seconds=at) for name, at in since.items()},
    )


def readings(view: View, *, at_most: int = 8, taken: frozenset[NodeId] = frozenset()) -> list[Reading]:
    return list(read_ahead(a_memory(view), taken=taken, saves=lambda *_: True, at_most=at_most))


def places(found: list[Reading]) -> list[tuple[str, str]]:
    return [(reading.name, reading.node_id) for reading in found]


def test_it_is_read_on_as_many_nodes_as_replicas_are_lacking() -> None:
    assert places(readings(waiting("m", waiters=2))) == [("m", "n00"), ("m", "n01")]


def test_who_waits_longest_chooses_first_and_a_node_reads_one_at_a_time() -> None:
    view = waiting("z", "a", waiters=2)

    assert places(readings(view)) == [("z", "n00"), ("z", "n01"), ("a", "n02")]
    assert places(readings(view, taken=frozenset({NodeId("n00")}))) == [("z", "n01"), ("z", "n02")]
    assert places(readings(view, at_most=1)) == [("z", "n00")]


def test_among_many_nodes_it_is_read_only_where_room_is_being_made_for_it() -> None:
    view = waiting("m", "v", nodes=MAX_NODES + 1)
    view = replace(view, demands={ModelName("m"): view.demands[ModelName("m")]}, refusals=view.refusals)
    leaving = a_reservation("r", "v", "n05", stopping_since_seconds=NOW_SECONDS, stopping_for=ModelName("m"))
    node = replace(view.nodes[NodeId("n05")], replicas={leaving.replica_id: a_replica("r", "v")})

    assert readings(view) == []
    making = replace(
        view, nodes={**view.nodes, node.node_id: node}, reservations={leaving.replica_id: leaving}
    )
    assert places(readings(making)) == [("m", "n05")]


def test_nothing_is_read_for_who_can_never_be_placed_or_lacks_nothing() -> None:
    never = waiting("m")
    refusal = replace(never.refusals[ModelName("m")], code="does_not_fit")

    assert readings(replace(never, refusals={ModelName("m"): refusal})) == []
    assert readings(replace(never, demands={})) == []


def test_what_runs_or_is_waited_for_is_never_dropped() -> None:
    view = waiting("m", "other", nodes=1, pool_bytes=GB + GB // 2)
    other = view.models[ModelName("other")]
    (node,) = view.nodes.values()
    held = {**node.held, other.checkpoint: Held(dram_bytes=GB, disk_bytes=GB)}
    full = replace(node, held=held, pool=replace(node.pool, free_bytes=GB // 2))
    view = replace(view, nodes={node.node_id: full})

    assert readings(view) == []
    only = {ModelName("m"): view.demands[ModelName("m")]}
    assert readings(replace(view, demands=only)) == [
        Reading(name=ModelName("m"), node_id=node.node_id, drop=(other.name,))
    ]
