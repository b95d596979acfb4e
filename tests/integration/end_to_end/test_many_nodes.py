"""Several nodes on one host: real agents and stores, declared devices, disks made slow."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import grpc

from stoker.v1 import controller_pb2, controller_pb2_grpc, model_pb2
from tests.integration.end_to_end.stoker_up import assert_all_ended, assert_nothing_listens, stoker_up

DISK_BYTES_PER_SECOND = 2_000_000


def test_two_nodes_with_one_device_each_serve_a_model_each_at_their_disks_speed(
    tmp_path: Path, tiny_model: Path
) -> None:
    weight_bytes = sum(path.stat().st_size for path in tiny_model.glob("*.safetensors"))
    shape = ("--nodes", "2", "--devices", "1", "--disk-bandwidth", str(DISK_BYTES_PER_SECOND / 1e6))
    with stoker_up(tmp_path, *shape) as up:
        with up.client() as client:
            for name in ("a", "b"):
                client.deploy(
                    model_pb2.ModelSpec(name=name, checkpoint_uri=str(tiny_model), keep_alive_seconds=-1)
                )
        with up.openai() as openai, ThreadPoolExecutor() as pool:
            ask = partial(
                openai.completions.create, prompt="the", max_tokens=2, extra_body={"ignore_eos": True}
            )
            answers = list(pool.map(lambda name: ask(model=name), "ab"))
        with grpc.insecure_channel(up.cluster.controller) as channel:
            stub = controller_pb2_grpc.ControllerStub(channel)
            listed = stub.ListNodes(controller_pb2.ListNodesRequest()).nodes
            replicas = stub.ListReplicas(controller_pb2.ListReplicasRequest()).replicas
        running = up.everything()
        up.stop()

    assert {node.report.node_id: len(node.report.devices) for node in listed} == {"node-1": 1, "node-2": 1}
    assert [answer.usage.completion_tokens for answer in answers if answer.usage] == [2, 2]
    assert {replica.node_id for replica in replicas} == {"node-1", "node-2"}
    for replica in replicas:
        read = [transfer for transfer in replica.timings.transfers if transfer.tier in ("disk", "page_cache")]
        took_seconds = sum(transfer.seconds for transfer in read)
        assert took_seconds >= sum(transfer.bytes for transfer in read) / DISK_BYTES_PER_SECOND * 0.99
        assert sum(transfer.bytes for transfer in read) >= weight_bytes
    assert (tmp_path / "logs" / "node-2" / "store.log").exists()
    assert not (tmp_path / "run").exists()
    assert_all_ended(running)
    assert_nothing_listens(up.cluster)
