"""What `stoker top` and `stoker explain` show."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console

from stoker.cli.live_view import TOP_NODES, TOP_REPLICAS, live_view
from stoker.cli.operate import stage_rows
from stoker.v1 import controller_pb2, node_agent_pb2, start_pb2

READY = node_agent_pb2.REPLICA_STATE_READY
STARTING = node_agent_pb2.REPLICA_STATE_STARTING


def a_node(node_id: str, *, reachable: bool = True, devices: int = 2) -> controller_pb2.Node:
    report = node_agent_pb2.NodeReport(
        node_id=node_id, devices=[node_agent_pb2.Device(index=index) for index in range(devices)]
    )
    return controller_pb2.Node(report=report, reachable=reachable)


def a_replica(replica_id: str, node_id: str = "a", **fields: object) -> node_agent_pb2.Replica:
    plain = {"model": "m", "state": READY, "devices": [0], **fields}
    return node_agent_pb2.Replica(replica_id=replica_id, node_id=node_id, **plain)  # type: ignore[arg-type]


def shown(
    nodes: Sequence[controller_pb2.Node], replicas: Sequence[node_agent_pb2.Replica]
) -> list[list[str]]:
    console = Console(width=200, force_terminal=False)
    with console.capture() as captured:
        console.print(live_view(nodes, replicas))
    return [line.split() for line in captured.get().splitlines()]


def test_who_does_not_answer_is_shown_first_then_the_busiest_node() -> None:
    nodes = [a_node("idle"), a_node("busy"), a_node("gone", reachable=False)]

    lines = shown(nodes, [a_replica("m.1", "busy", running_sessions=3, waiting_sessions=1)])

    assert [line[0] for line in lines[2:5]] == ["gone", "busy", "idle"]
    assert lines[3][:5] == ["busy", "ready", "1/2", "3", "1"]


def test_the_busiest_replica_is_shown_first_and_a_start_with_how_far_it_is() -> None:
    replicas = [
        a_replica("m.1", state=STARTING, loaded_fraction=0.25),
        a_replica("m.2", running_sessions=2),
    ]

    lines = shown([a_node("a")], replicas)

    assert [line[0] for line in lines[-2:]] == ["m.2", "m.1"]
    assert lines[-1][3:5] == ["starting", "25%"]


def test_what_is_left_out_is_counted() -> None:
    nodes = [a_node(f"n{number:02d}") for number in range(TOP_NODES + 2)]
    replicas = [a_replica(f"m.{number}") for number in range(TOP_REPLICAS + 1)]

    lines = [" ".join(line) for line in shown(nodes, replicas)]

    assert "and 2 more nodes: stoker nodes" in lines
    assert "and 1 more replicas: stoker ps" in lines


def test_a_start_is_explained_stage_by_stage_as_expected_and_as_measured() -> None:
    predicted = controller_pb2.ExplainedOption(load_seconds=2.0, overhead_seconds=0.1, total_seconds=2.1)
    measured = start_pb2.StartTimings(weights_seconds=2.5, skeleton_seconds=0.3, total_seconds=3.0)

    rows = {name.strip(): (expected, took) for name, expected, took in stage_rows(predicted, measured)}

    assert rows["weights"] == ("2.00 s", "2.50 s")
    assert rows["the rest"] == ("100 ms", "500 ms")
    assert rows["total"] == ("2.10 s", "3.00 s")
