"""A real daemon, and a LoRA adapter on a real HTTP origin: fetched once, kept on disk, never mistaken."""

from __future__ import annotations

import functools
import json
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest

from stoker.attach import attach
from stoker.checkpoint.adapter import open_adapter
from stoker.errors import CheckpointInvalid
from stoker.loader.adapters import attached_plan
from stoker.units import KIB
from stoker.v1 import checkpoint_store_pb2 as pb
from tests.integration.store.daemon import running
from tests.integration.store.origin_server import OriginServer, origin_server
from tests.integration.store.test_remote import describe, load, whole_folders
from tests.integration.store.test_store import SECONDS, contents, files
from tests.unit.services.store.test_adapters import MODULE, base, lora

WEIGHTS = "adapter_model.safetensors"
daemon_with = functools.partial(running, chunk_bytes=64 * KIB, origin_attempts=2)


@pytest.fixture
def origin(tmp_path):
    folder = tmp_path / "poet"
    lora(folder)
    (folder / "tokenizer.json").write_text("{}")  # as trainers leave it there
    with origin_server(folder) as server:
        yield server


def describe_adapter(daemon, uri: str, checkpoint: str):
    with daemon.stub() as stub:
        request = pb.DescribeAdapterRequest(uri=uri, checkpoint_uri=checkpoint)
        return stub.DescribeAdapter(request, timeout=SECONDS)


def test_a_far_adapter_is_fetched_once_and_comes_from_disk_after_a_restart(origin: OriginServer, tmp_path):
    checkpoint, cache = base(tmp_path / "m"), tmp_path / "cache"
    size = (origin.folder / WEIGHTS).stat().st_size
    with daemon_with(tmp_path / "run", cache_dir=cache) as daemon:
        found = describe_adapter(daemon, origin.url, checkpoint)
        assert (found.uri, found.far, found.rank, list(found.target_modules)) == (
            *(origin.url, True, 2),
            ["q_proj"],
        )
        headers = origin.weights_sent()
        with ThreadPoolExecutor(4) as threads:
            attached = list(threads.map(lambda _: load(daemon, origin.url), range(4)))
        for each in attached:
            with each:
                assert contents(each) == {WEIGHTS: files(origin.folder)[WEIGHTS]}
                assert attached_plan(each).pairs == open_adapter(origin.folder).pairs
        assert origin.weights_sent() == headers + size
        with daemon.stub() as stub:
            (last,) = list(stub.Pull(pb.PullRequest(uri=origin.url), timeout=SECONDS))[-1:]
            verified = stub.VerifyCopy(pb.VerifyCopyRequest(uri=origin.url), timeout=SECONDS)
        assert (last.disk_bytes, last.checkpoint.layout) == (size, "adapter")
        assert not verified.digests_checked

    (folder,) = whole_folders(cache)
    assert open_adapter(folder).revision == found.revision
    sent = origin.weights_sent()
    with daemon_with(tmp_path / "run2", cache_dir=cache) as daemon:
        with attach(daemon.attach_socket, origin.url, revision=found.revision, holder="test") as one:
            one.wait_all(timeout_seconds=SECONDS)
            assert contents(one) == {WEIGHTS: files(origin.folder)[WEIGHTS]}
        assert describe_adapter(daemon, origin.url, checkpoint) == found  # the tokenizer changes nothing
    assert origin.weights_sent() == sent


def test_an_adapter_that_was_changed_at_its_origin_is_not_taken_for_the_deployed_one(
    origin: OriginServer, tmp_path
):
    checkpoint = base(tmp_path / "m")
    with daemon_with(tmp_path / "run") as daemon:
        before = describe_adapter(daemon, origin.url, checkpoint)
        config = {"peft_type": "LORA", "r": 2, "lora_alpha": 64}
        (origin.folder / "adapter_config.json").write_text(json.dumps(config))
        after = describe_adapter(daemon, origin.url, checkpoint)

        assert after.revision != before.revision
        with pytest.raises(CheckpointInvalid, match="deploy the model again"):
            attach(daemon.attach_socket, origin.url, revision=before.revision, holder="test")


def test_what_does_not_belong_together_is_refused_before_anything_is_loaded(origin: OriginServer, tmp_path):
    other = base(tmp_path / "other", name=f"{MODULE}.weight", shape=(8, 8))
    with daemon_with(tmp_path / "run") as daemon:
        with pytest.raises(grpc.RpcError, match="is no adapter for") as misfit:
            describe_adapter(daemon, origin.url, other)
        with pytest.raises(grpc.RpcError, match="deploy its base, with --adapter") as no_model:
            describe(daemon, origin.url)
        (origin.folder / WEIGHTS).unlink()
        with pytest.raises(grpc.RpcError, match=f"{WEIGHTS} is missing"):
            describe_adapter(daemon, origin.url, other)

    assert {misfit.value.code(), no_model.value.code()} == {grpc.StatusCode.FAILED_PRECONDITION}
