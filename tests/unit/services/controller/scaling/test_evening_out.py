"""Exchanges of what is in memory: they end, leave numbers alike, and don't depend on an order of names."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from services.controller.cluster_view.view import Device, Held, Node, Pool, View
from services.controller.scaling.evening_out import LEAST_DIFFERENCE, even_out
from services.controller.scaling.reading_ahead import Reading
from stoker.ids import ModelName, NodeId
from stoker.units import GB
from tests.unit.services.controller.builders import a_memory, a_model, a_node, a_view

NODES, MODELS, PER_NODE = 4, 8, 3
POOL_BYTES = PER_NODE * GB + GB // 2
"""Full with `PER_NODE` checkpoints."""
CUDA = (Device(index=0, kind="cuda", memory_bytes=80 * GB),)


def full_cluster(seed: int) -> View:
    """Return nodes with every checkpoint on disk and some, at random, in a memory that they fill."""
    drawn = random.Random(seed)
    models = tuple(a_model(f"m{index}") for index in range(MODELS))
    nodes = []
    for index in range(NODES):
        in_memory = drawn.sample(models, PER_NODE)
        held = {
            model.checkpoint: Held(dram_bytes=GB if model in in_memory else 0, disk_bytes=GB)
            for model in models
        }
        pool = Pool(total_bytes=POOL_BYTES, free_bytes=POOL_BYTES - PER_NODE * GB)
        nodes.append(a_node(f"n{index}", devices=1, held=held, pool=pool))
    return a_view(models=models, nodes=tuple(replace(node, devices=CUDA) for node in nodes))


def exchanges(view: View) -> list[Reading]:
    return list(even_out(a_memory(view), taken=frozenset(), coming=(), at_most=NODES))


def carried_out(view: View, readings: list[Reading]) -> View:
    nodes: dict[NodeId, Node] = {}
    for reading in readings:
        node = view.nodes[reading.node_id]
        held = dict(node.held)
        for name in reading.drop:
            held[view.models[name].checkpoint] = Held(disk_bytes=GB)
        held[view.models[reading.name].checkpoint] = Held(dram_bytes=GB, disk_bytes=GB)
        nodes[node.node_id] = replace(node, held=held)
    return replace(view, nodes={**view.nodes, **nodes}, index=None)


def copies_of(view: View) -> Counter[ModelName]:
    names = {model.checkpoint: name for name, model in view.models.items()}
    held = (pair for node in view.nodes.values() for pair in node.held.items())
    return Counter(names[checkpoint] for checkpoint, found in held if found.dram_bytes)


@pytest.mark.parametrize("seed", range(12))
def test_exchanges_end_and_leave_no_two_further_apart_than_one_where_a_node_could_mend_it(seed: int) -> None:
    view, rounds = full_cluster(seed), 0
    while readings := exchanges(view):
        view, rounds = carried_out(view, readings), rounds + 1
        assert rounds <= NODES * MODELS

    copies = copies_of(view)
    assert sum(copies.values()) == NODES * PER_NODE
    for node in view.nodes.values():
        there = [name for name, model in view.models.items() if node.held[model.checkpoint].dram_bytes]
        absent = [name for name in view.models if name not in there]
        most, fewest = max(copies[name] for name in there), min(copies[name] for name in absent)
        assert most - fewest < LEAST_DIFFERENCE


def test_the_order_of_names_does_not_matter() -> None:
    view = full_cluster(3)
    turned = replace(
        view,
        models=dict(reversed(list(view.models.items()))),
        nodes={
            node_id: replace(node, held=dict(reversed(list(node.held.items()))))
            for node_id, node in reversed(list(view.nodes.items()))
        },
    )

    assert exchanges(view)
    assert exchanges(turned) == exchanges(view)
