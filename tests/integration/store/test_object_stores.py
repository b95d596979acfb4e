"""s3:// against a tiny S3, hf:// against a tiny hub, push into a folder: real daemons, real clients."""

from __future__ import annotations

import json
import os
import shutil
import threading
import urllib.parse
from collections import deque
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from xml.sax.saxutils import escape

import grpc
import pytest

from services.store.origins.object_store import ObjectStoreOrigin, cloud_store
from services.store.origins.origin import OriginChanged, OriginRefused
from services.store.origins.ranges import Ranges, Retry
from stoker.attach import attach
from stoker.checkpoint.adapter import adapter_index
from stoker.checkpoint.convert import convert
from stoker.checkpoint.index import open_checkpoint
from stoker.cli.push import push
from stoker.errors import AlreadyExists, InvalidRequest, NotFound, PeerError
from stoker.units import KIB
from stoker.v1 import checkpoint_store_pb2 as pb
from tests.integration.store.daemon import running, small_disk
from tests.integration.store.origin_server import Fault, OriginServer, origin_server, serve_file, tag_of
from tests.integration.store.test_store import SECONDS, contents, files, write_checkpoint
from tests.unit.services.store.test_adapters import base, lora

SHA = "0123456789abcdef0123456789abcdef01234567"
CHUNK = 64 * KIB
S3 = "s3://bucket/model"
WEIGHTS = "model.safetensors"


def answer(handler: BaseHTTPRequestHandler, status: int, body: bytes, **headers: str) -> None:
    handler.send_response(status)
    for name, value in headers.items():
        handler.send_header(name.replace("_", "-"), value)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    if handler.command != "HEAD":
        handler.wfile.write(body)


def tiny_s3(handler: BaseHTTPRequestHandler, server: OriginServer) -> None:
    """List and get under /bucket/model/, for signed requests only."""
    if "AWS4-HMAC-SHA256 Credential=key-of-test/" not in handler.headers.get("Authorization", ""):
        answer(handler, 403, b"<Error><Code>AccessDenied</Code></Error>")
        return
    path, _, query = handler.path.partition("?")
    asked = urllib.parse.parse_qs(query)
    if "list-type" not in asked:
        serve_file(handler, server, path.removeprefix("/bucket/model/"))
        return
    prefix = asked.get("prefix", [""])[0]
    listed = "".join(
        f"<Contents><Key>{escape('model/' + file.name)}</Key><Size>{file.stat().st_size}</Size>"
        f"<ETag>{escape(tag_of(file))}</ETag>"
        "<LastModified>2026-01-01T00:00:00.000Z</LastModified></Contents>"
        for file in sorted(server.folder.iterdir())
        if ("model/" + file.name).startswith(prefix)
    )
    body = f"<ListBucketResult><IsTruncated>false</IsTruncated>{listed}</ListBucketResult>"
    answer(handler, 200, body.encode(), Content_Type="application/xml")


def tiny_hub(handler: BaseHTTPRequestHandler, server: OriginServer) -> None:
    """The hub's model_info, and files that redirect to another place."""
    if handler.headers.get("Authorization") != "Bearer hf_test" and "/cdn/" not in handler.path:
        answer(handler, 401, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="Repository Not Found")
    elif handler.path.startswith("/api/models/owner/name"):
        siblings = [
            {"rfilename": file.name, "size": file.stat().st_size, "blobId": f"blob of {file.name}"}
            for file in sorted(server.folder.iterdir())
        ]
        info = {"_id": "1", "id": "owner/name", "sha": SHA, "siblings": siblings, "private": False}
        answer(handler, 200, json.dumps(info).encode(), Content_Type="application/json")
    elif handler.path.startswith(f"/owner/name/resolve/{SHA}/"):
        answer(handler, 302, b"", Location="/cdn/" + handler.path.rpartition("/")[2])
    else:
        serve_file(handler, server, handler.path.removeprefix("/cdn/"))


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_checkpoint(tmp_path / "origin", sizes=[200_000, 500_003])


@pytest.fixture
def s3(folder, monkeypatch):
    with origin_server(folder, tiny_s3) as server:
        monkeypatch.setenv("AWS_ENDPOINT_URL", server.url.removesuffix("/models/one"))
        monkeypatch.setenv("AWS_ALLOW_HTTP", "true")
        monkeypatch.setenv("AWS_REGION", "test-1")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key-of-test")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-of-test")
        yield server


def loaded(daemon, uri: str) -> dict[str, bytes]:
    with attach(daemon.attach_socket, uri, holder="test") as attachment:
        attachment.wait_all(timeout_seconds=SECONDS)
        return contents(attachment)


def test_a_checkpoint_in_s3_is_loaded_with_the_environments_credentials(s3: OriginServer, tmp_path):
    with running(tmp_path / "run", chunk_bytes=CHUNK, cache_dir=tmp_path / "cache") as daemon:
        assert loaded(daemon, "s3://bucket/model") == files(s3.folder)
    assert "secret-of-test" not in daemon.log.read_text()


def test_an_s3_that_refuses_is_told_as_such(s3: OriginServer, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "somebody-else")
    with running(tmp_path / "run") as daemon, daemon.stub() as stub, pytest.raises(grpc.RpcError) as caught:
        stub.Describe(pb.DescribeRequest(uri="s3://bucket/model"), timeout=SECONDS)

    assert "credentials" in caught.value.details()
    assert "secret-of-test" not in caught.value.details() + daemon.log.read_text()


@pytest.fixture
def ranges(s3: OriginServer):
    origin = ObjectStoreOrigin(S3, lambda: cloud_store(S3, timeout_seconds=SECONDS))
    return Ranges(origin, retry=Retry(attempts=2, first_seconds=0.0), stopped=threading.Event())


def read(ranges: Ranges, *, offset: int, length: int) -> bytes:
    (file,) = ranges.find([WEIGHTS]).values()
    into = bytearray(length)
    ranges.read_into(file, memoryview(into), offset=offset)
    return bytes(into)


@pytest.mark.parametrize("fault", [Fault(status=429), Fault(status=500), Fault(cut_after=1000)])
def test_an_s3_that_stumbles_is_asked_again(ranges: Ranges, s3: OriginServer, fault: Fault):
    s3.faults[WEIGHTS] = deque([fault])

    assert read(ranges, offset=4096, length=100_000) == files(s3.folder)[WEIGHTS][4096:104_096]
    assert len(s3.gets[WEIGHTS]) == 2


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        (Fault(status=403), OriginRefused, "credentials"),
        (Fault(status=404), NotFound, "no such object"),
        (Fault(whole=True), OriginRefused, "ignores Range"),
        (Fault(status=500), PeerError, "500.*2 times"),
        (Fault(cut_after=0), PeerError, "2 times"),
    ],
)
def test_an_s3_that_cannot_give_a_range_is_given_up_with_its_reason(
    ranges: Ranges, s3: OriginServer, fault: Fault, error: type[Exception], message: str
):
    s3.always[WEIGHTS] = fault

    with pytest.raises(error, match=message):
        read(ranges, offset=4096, length=100_000)
    assert len(s3.gets[WEIGHTS]) == (2 * 4 if error is PeerError else 1)  # each of ours is 4 of obstore's


def test_an_object_that_was_replaced_in_s3_is_never_mixed_with_the_old_one(ranges: Ranges, s3: OriginServer):
    (file,) = ranges.find([WEIGHTS]).values()
    (s3.folder / WEIGHTS).write_bytes(os.urandom(file.size_bytes))

    with pytest.raises(OriginChanged, match="was changed"):
        ranges.read_into(file, memoryview(bytearray(100)), offset=0)


def test_an_adapter_is_loaded_from_s3_and_from_a_shared_folder(tmp_path, s3: OriginServer):
    checkpoint = base(tmp_path / "m")
    shared = tmp_path / "shared"
    shared.mkdir()
    poet = Path(lora(shared / "poet"))
    shutil.rmtree(s3.folder)
    lora(s3.folder)
    settings = {"cache_dir": tmp_path / "cache", "shared_roots": json.dumps([str(shared)])}
    with running(tmp_path / "run", chunk_bytes=CHUNK, **settings) as daemon, daemon.stub() as stub:
        for uri, folder in ((S3, s3.folder), (str(poet), poet)):
            request = pb.DescribeAdapterRequest(uri=uri, checkpoint_uri=checkpoint)
            found = stub.DescribeAdapter(request, timeout=SECONDS)

            assert (found.far, list(found.target_modules)) == (True, ["q_proj"])
            assert loaded(daemon, uri) == files(folder)


def test_a_model_of_the_hub_is_loaded_at_one_commit(folder, tmp_path, monkeypatch):
    with origin_server(folder, tiny_hub) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url.removesuffix("/models/one"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        with running(tmp_path / "run", chunk_bytes=CHUNK) as daemon:
            assert loaded(daemon, "hf://owner/name") == files(folder)
        assert "hf_test" not in daemon.log.read_text()


@pytest.mark.parametrize("convert_first", [True, False])
def test_what_was_pushed_is_the_checkpoint_again(folder, tmp_path, convert_first):
    source = convert(folder, tmp_path / "converted") if convert_first else open_checkpoint(folder)
    target = tmp_path / "target"
    seen = []
    sent = push(source, str(target), overwrite=False, progress=lambda done, total: seen.append((done, total)))

    there = open_checkpoint(target)
    assert files(target) == files(source.path)
    assert (there.layout, there.weight_bytes) == (source.layout, source.weight_bytes)
    assert list(sent)[-1] == ("stoker.json" if convert_first else "config.json")
    assert seen[-1] == (sum(sent.values()), sum(sent.values()))
    with pytest.raises(AlreadyExists, match="--overwrite"):
        push(source, str(target), overwrite=False)
    push(source, target.as_uri(), overwrite=True)


def test_a_pushed_adapter_is_the_adapter_again_and_its_config_goes_last(tmp_path):
    target = tmp_path / "target"
    sent = push(adapter_index(lora(tmp_path / "poet")), str(target), overwrite=False)

    assert list(sent) == ["adapter_model.safetensors", "adapter_config.json"]
    assert files(target) == files(tmp_path / "poet")
    with pytest.raises(AlreadyExists, match="an adapter already"):
        push(adapter_index(tmp_path / "poet"), str(target), overwrite=False)


def test_pushing_to_where_it_cannot_go_is_refused(folder):
    with pytest.raises(InvalidRequest, match="hf upload"):
        push(open_checkpoint(folder), "hf://owner/name", overwrite=False)
    for below_a_file in (str(folder / "config.json"), (folder / "config.json" / "x").as_uri()):
        with pytest.raises(InvalidRequest, match="give a folder that you may write"):
            push(open_checkpoint(folder), below_a_file, overwrite=False)


def test_a_disk_that_is_full_is_told_in_one_line_and_leaves_nothing_that_looks_complete(folder, tmp_path):
    with small_disk(tmp_path / "small", "size=100k") as disk:
        with pytest.raises(
            PeerError, match=r"is not complete: .*No space left on device.*push again"
        ) as full:
            push(open_checkpoint(folder), str(disk / "m"), overwrite=False)
        assert not (disk / "m" / "config.json").exists()
    assert "Debug" not in full.value.message


def test_a_private_adapter_of_the_hub_is_described_and_loaded(tmp_path, monkeypatch):
    poet = Path(lora(tmp_path / "poet"))
    with origin_server(poet, tiny_hub) as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url.removesuffix("/models/one"))
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        with running(tmp_path / "run", chunk_bytes=CHUNK) as daemon:
            with daemon.stub() as stub:
                request = pb.DescribeAdapterRequest(
                    uri="hf://owner/name", checkpoint_uri=base(tmp_path / "m")
                )
                found = stub.DescribeAdapter(request, timeout=SECONDS)
            assert loaded(daemon, found.uri) == {
                "adapter_model.safetensors": files(poet)["adapter_model.safetensors"]
            }
    assert found.far
