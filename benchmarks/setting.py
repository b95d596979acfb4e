"""What the benchmarks share: the machine in a line, the cluster under test, a client that costs little."""

from __future__ import annotations

import asyncio
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from stoker.cli.local_cluster import ClusterOptions, running_cluster
from stoker.client import AsyncClient
from stoker.client.connection import LocalCluster

ROOT = Path(__file__).resolve().parent.parent
MODEL_DIR = ROOT / ".cache" / "models" / "smollm2-135m-instruct"


def describe_machine() -> str:
    """Return processor, cores, memory and Python in one line."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ),
        platform.machine(),
    )
    memory_kib = int(Path("/proc/meminfo").read_text().split()[1])
    return (
        f"{cpu}, {os.cpu_count()} cores, {memory_kib / 2**20:.0f} GiB, "
        f"Linux {platform.release()}, Python {platform.python_version()}"
    )


def print_heading(title: str) -> None:
    """Print what is measured, on what, with which command."""
    command = " ".join(["python", os.path.relpath(sys.argv[0], ROOT), *sys.argv[1:]])
    print(f"# {title}\n# {describe_machine()}\n# {command}\n", flush=True)


def drop_page_cache(folder: Path) -> None:
    """Drop the weight files below `folder` from the kernel's cache, as far as no process maps them."""
    for path in folder.glob("*.safetensors"):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def median(values: Sequence[float]) -> float:
    """Return the median; raises on no values, so that a benchmark that measured nothing fails."""
    return statistics.median(values)


@asynccontextmanager
async def cluster(name: str, **options: object) -> AsyncIterator[tuple[LocalCluster, AsyncClient]]:
    """Run a whole cluster on free ports; yields its addresses and an administration client."""
    chosen = ClusterOptions(data_dir=ROOT / ".data" / f"bench-{name}", rest_port=0, grpc_port=0, **options)  # type: ignore[arg-type]
    async with (
        running_cluster(chosen) as running,
        AsyncClient(gateway=running.gateway, controller=running.controller) as admin,
    ):
        yield running, admin


async def until_warm_worker(admin: AsyncClient) -> None:
    """Wait until a pre-started worker is ready, as on a host that has been up for a moment."""
    async with asyncio.timeout(120):
        while not any(node.report.warm_workers for node in await admin.nodes()):  # noqa: ASYNC110 - a benchmark
            await asyncio.sleep(0.05)


async def until_cold(admin: AsyncClient) -> None:
    """Wait until no replica is left."""
    async with asyncio.timeout(120):
        while await admin.replicas():  # noqa: ASYNC110 - a benchmark
            await asyncio.sleep(0.05)


@dataclass(slots=True)
class StreamResult:
    """One streamed answer as its client saw it; times on the monotonic clock."""

    sent_seconds: float
    request_id: str = ""
    token_times_seconds: list[float] = field(default_factory=list)
    """When each content chunk came."""
    completion_tokens: int = 0
    text: str = ""

    @property
    def first_token_seconds(self) -> float:
        """Seconds from sending the request to its first content."""
        return self.token_times_seconds[0] - self.sent_seconds


class KeptConnection:
    """A connection to a gateway that carries one request after another, as a client's pool keeps them.

    Args:
        base_url: Of the gateway.
    """

    def __init__(self, base_url: str) -> None:
        self.host, _, port = base_url.removeprefix("http://").partition(":")
        self._port = int(port)
        self._ends: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ends(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        """Return where to read and write; connects at the first call, and when the gateway closed it idle."""
        if self._ends is not None and self._ends[0].at_eof():
            self.close()
        if self._ends is None:
            self._ends = await asyncio.open_connection(self.host, self._port)
        return self._ends

    def close(self) -> None:
        """Close it; the next call of `ends` connects again."""
        if self._ends is not None:
            self._ends[1].close()
            self._ends = None


async def stream_chat(
    base_url: str, body: dict[str, object], result: StreamResult | None = None
) -> StreamResult:
    """Send a chat request over a connection of its own and read the stream; see `stream_kept`."""
    connection = KeptConnection(base_url)
    try:
        return await stream_kept(connection, body, result)
    finally:
        connection.close()


async def stream_kept(
    connection: KeptConnection, body: dict[str, object], result: StreamResult | None = None
) -> StreamResult:
    """Send a chat request and read the stream with a bare socket: the client must not be what is measured.

    Args:
        connection: To the gateway; it can carry the next request afterwards.
        body: Of the request.
        result: Filled while the stream comes, for whoever looks meanwhile; one is made if there is none.

    Raises:
        RuntimeError: The answer is not 200, or the stream carried an error or was cut off.
    """
    payload = json.dumps({**body, "stream": True, "stream_options": {"include_usage": True}}).encode()
    reader, writer = await connection.ends()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: {connection.host}\r\nContent-Type: application/json\r\n"
        f"Content-Length: {len(payload)}\r\n\r\n"
    )
    result = result or StreamResult(sent_seconds=0.0)
    result.sent_seconds = time.monotonic()
    writer.write(head.encode() + payload)
    status = await reader.readline()
    while (line := await reader.readline()).strip():
        if line.lower().startswith(b"x-request-id:"):
            result.request_id = line.split(b":", 1)[1].strip().decode()
    if b" 200 " not in status:
        connection.close()
        raise RuntimeError(f"{status!r}: {(await reader.read(500))!r}")
    while (line := await reader.readline()) != b"0\r\n":  # the last chunk of a body in chunks
        if not line:
            connection.close()
            raise RuntimeError("the stream was cut off")
        _take(line, time.monotonic(), result)
    await reader.readline()
    return result


def _take(line: bytes, came_seconds: float, result: StreamResult) -> None:
    if not line.startswith(b"data: {"):
        return
    if b'"content":"' in line or b'"content": "' in line:
        chunk = json.loads(line[6:])
        content = chunk["choices"][0]["delta"].get("content") if chunk["choices"] else None
        if content:
            result.token_times_seconds.append(came_seconds)
            result.text += content
    elif b'"error"' in line:
        raise RuntimeError(line.decode())
    if b'"completion_tokens"' in line:
        usage = json.loads(line[6:]).get("usage")
        if usage:
            result.completion_tokens = usage["completion_tokens"]
