"""What `stoker up --nodes` gives each node."""

from __future__ import annotations

import json
from pathlib import Path

from stoker.cli.local_nodes import (
    LocalNode,
    NodeShape,
    agent_settings,
    layout,
    pool_of_each,
    ports_needed,
    store_settings,
)

DATA, RUN = Path("/data"), Path("/data/run")


def _nodes(count: int) -> tuple[LocalNode, ...]:
    return layout(count, DATA, RUN, range(1000, 1000 + ports_needed(count)))


def test_one_node_is_this_host_with_its_own_name_and_gpus() -> None:
    (node,) = _nodes(1)

    settings = agent_settings(node, NodeShape(), ["c:1"])

    assert (node.log_dir, node.run_dir, node.cache_dir) == (DATA / "logs", RUN, DATA / "checkpoints")
    assert settings.keys().isdisjoint({"NODE_ID", "USE_GPUS"})
    assert settings["CPU_SLOTS"] == "2"


def test_several_nodes_share_no_folder_and_no_port() -> None:
    nodes = _nodes(4)

    assert [node.node_id for node in nodes] == ["node-1", "node-2", "node-3", "node-4"]
    addresses = [address for node in nodes for address in (node.agent, node.store, node.peer)]
    folders = [folder for node in nodes for folder in (node.run_dir, node.log_dir, node.cache_dir)]
    assert len(set(addresses)) == len(addresses) == 12
    assert len(set(folders)) == len(folders) == 12


def test_declared_devices_hide_gpus() -> None:
    settings = agent_settings(_nodes(2)[0], NodeShape(devices=3), ["c:1"])

    assert (settings["CPU_SLOTS"], settings["USE_GPUS"]) == ("3", "false")


def test_a_store_knows_the_other_nodes_stores_and_its_pace() -> None:
    nodes = _nodes(2)

    settings = store_settings(nodes[0], NodeShape(disk_bytes_per_second=5e6), nodes)

    assert json.loads(settings["PEERS"]) == [node.peer for node in nodes]
    assert json.loads(settings["PACED_BYTES_PER_SECOND"]) == {"disk": 5e6, "peer": 0, "remote": 0}


def test_several_stores_take_together_what_one_would() -> None:
    assert pool_of_each(4, 0, 1600) == 100
    assert pool_of_each(4, 7, 1600) == 7
    assert pool_of_each(1, 0, 1600) == 0
