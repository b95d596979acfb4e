"""The node's report, built from values."""

from __future__ import annotations

from dataclasses import replace

from services.node_agent.devices import Memory
from services.node_agent.host_state import Hosted, HostState, ReplicaPhase, Worker, WorkerPhase
from services.node_agent.reporter import address_for_others
from services.node_agent.reports import Identity, Load, Observed, build_report
from stoker.ids import ReplicaId, WorkerId
from stoker.v1.checkpoint_store_pb2 import StoredCheckpoint, StoreStatus
from stoker.v1.model_pb2 import CheckpointInfo, ModelSpec
from stoker.v1.node_agent_pb2 import (
    REPLICA_STATE_FAILED,
    REPLICA_STATE_READY,
    REPLICA_STATE_STARTING,
    Device,
    NodeReport,
    StartReplicaRequest,
)
from stoker.v1.start_pb2 import StartTimings
from stoker.v1.worker_pb2 import LoadModelResponse

IDENTITY = Identity(
    node_id="node-1",
    boot_id="boot-1",
    agent_address="a:1",
    store_address="s:1",
    devices=[Device(index=0, kind="cpu")],
    labels={"zone": "x"},
    version="1",
)
CHECKPOINT = CheckpointInfo(uri="/m", revision="r1", file_bytes=1000)
STARTING = Hosted(
    order=StartReplicaRequest(
        replica_id="rep-1",
        spec=ModelSpec(name="tiny"),
        checkpoint=CHECKPOINT,
        devices=[0],
        placement_seconds=0.25,
        predicted_seconds=2.0,
    ),
    phase=ReplicaPhase.STARTING,
    ordered_seconds=10.0,
    worker_id=WorkerId("w-1"),
    handed_seconds=10.5,
)
SEEN = Observed(
    loads={
        ReplicaId("rep-1"): Load(
            running_sessions=2, waiting_sessions=1, worker_pid=7, longest_wait_seconds=3.5
        )
    },
    memory=Memory(total_bytes=100, free_bytes=40),
    store=StoreStatus(checkpoints=[StoredCheckpoint(checkpoint=CHECKPOINT, dram_bytes=250)]),
    architectures=["LlamaForCausalLM"],
    worker_start_seconds=3.0,
    next_worker_seconds=0.0,
    unix_minus_monotonic_seconds=1e9,
)


def report(hosted: Hosted, seen: Observed = SEEN) -> NodeReport:
    """Build the report of a host with one replica."""
    return build_report(IDENTITY, HostState(replicas={hosted.replica_id: hosted}), seen, 5)


def test_a_report_says_who_it_is_about() -> None:
    made = report(STARTING)

    assert (made.node_id, made.boot_id, made.sequence) == ("node-1", "boot-1", 5)
    assert (made.memory_bytes, made.memory_free_bytes, made.worker_start_seconds) == (100, 40, 3.0)
    assert dict(made.labels) == {"zone": "x"}


def test_a_starting_replica_says_how_much_of_it_is_loaded() -> None:
    replica = report(STARTING).replicas[0]

    assert (replica.state, replica.loaded_fraction) == (REPLICA_STATE_STARTING, 0.25)


def test_nothing_is_known_to_be_loaded_without_the_store_or_of_another_revision() -> None:
    other = replace(STARTING, order=StartReplicaRequest(checkpoint=CheckpointInfo(uri="/m", revision="r2")))

    assert report(STARTING, replace(SEEN, store=None)).replicas[0].loaded_fraction == 0.0
    assert report(other).replicas[0].loaded_fraction == 0.0


def test_a_ready_replica_reports_every_stage_and_the_total_from_the_decision_on() -> None:
    loaded = LoadModelResponse(
        timings=StartTimings(attach_seconds=0.1, skeleton_seconds=0.2), max_context_tokens=512, max_batch=8
    )
    replica = report(replace(STARTING, phase=ReplicaPhase.READY, loaded=loaded, ready_seconds=11.0)).replicas[
        0
    ]

    assert replica.state == REPLICA_STATE_READY
    assert (replica.timings.worker_seconds, replica.timings.attach_seconds) == (0.5, 0.1)
    assert (replica.timings.total_seconds, replica.timings.predicted_seconds) == (1.25, 2.0)
    assert replica.ready_unix_seconds == 1e9 + 11.0
    assert (replica.running_sessions, replica.waiting_sessions, replica.worker_pid) == (2, 1, 7)
    assert replica.longest_wait_seconds == 3.5


def test_a_replica_at_which_nobody_waits_reports_no_wait() -> None:
    assert not report(STARTING, replace(SEEN, loads={})).replicas[0].HasField("longest_wait_seconds")


def test_a_replica_that_takes_sessions_while_it_loads_says_how_far_it_is() -> None:
    loaded = LoadModelResponse(loading=True)
    replica = report(replace(STARTING, phase=ReplicaPhase.READY, loaded=loaded, ready_seconds=11.0)).replicas[
        0
    ]

    assert (replica.state, replica.loading, replica.loaded_fraction) == (REPLICA_STATE_READY, True, 0.25)
    assert (replica.timings.ready_seconds, replica.timings.total_seconds) == (1.25, 0.0)


def test_the_total_of_such_a_replica_ends_with_its_last_weights() -> None:
    ready = replace(
        STARTING,
        phase=ReplicaPhase.READY,
        loaded=LoadModelResponse(),
        ready_seconds=11.0,
        complete_seconds=13.0,
    )

    timings = report(ready).replicas[0].timings

    assert (timings.ready_seconds, timings.total_seconds) == (1.25, 3.25)


def test_a_failed_replica_says_why() -> None:
    replica = report(
        replace(STARTING, phase=ReplicaPhase.FAILED, error_code="load_failed", error_message="broken")
    ).replicas[0]

    assert (replica.state, replica.error_code) == (REPLICA_STATE_FAILED, "load_failed")
    assert replica.error_message == "broken"


def test_only_workers_without_a_model_count_as_warm() -> None:
    workers = {
        WorkerId(f"w-{phase}"): Worker(worker_id=WorkerId(f"w-{phase}"), phase=phase, since_seconds=0.0)
        for phase in WorkerPhase
    }

    assert build_report(IDENTITY, HostState(workers=workers), SEEN, 1).warm_workers == 1


def test_the_address_for_others_has_the_port_that_was_given() -> None:
    assert address_for_others("", "127.0.0.1:0", 4711) == "127.0.0.1:4711"
    assert address_for_others("host-1:7071", "0.0.0.0:7071", 7071) == "host-1:7071"
