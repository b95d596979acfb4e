"""1, 2 and 4 stores load the same checkpoint at once over shaped links: the origin is read once.

    sudo python benchmarks/fanout.py [--megabytes 256] [--megabits 400] [--stores 1 2 4]

Every store and the origin (an HTTP server) is a process in a network namespace of its own, tied to one bridge
by a link that `tc tbf` shapes in both directions: each sends and receives at most so much, as hosts on one
switch do. Cold each time: a new daemon, nothing in its pool, no disk cache.

Judged: the bytes of weights that the origin sent (1 copy, whatever the number of stores) and the time until
the last store has everything, against one store alone in the same run (at most 1.3 times).

Needs root (namespaces, tc). This process enters a network namespace that has no name, and the others are
tied to their processes: when these end, however they end, the kernel takes links and namespaces away.
"""

from __future__ import annotations

import argparse
import asyncio
import ctypes
import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.request import urlopen

from arguments import positive
from setting import print_heading

from stoker.rpc import connect
from stoker.v1.checkpoint_store_pb2 import PrefetchRequest, PrefetchResponse
from stoker.v1.checkpoint_store_pb2_grpc import CheckpointStoreStub

TARGET_RATIO = 1.3
TARGET_COPIES = 1.01
"""A request that broke off is asked again: less than a hundredth of a copy may come twice."""

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
BRIDGE = "stoker-fan"
GATEWAY = "10.213.0.1"
ORIGIN = "10.213.0.2"
FIRST_STORE = 10
ORIGIN_PORT, STORE_PORT, PEER_PORT = 8080, 7072, 7073
BURST_BYTES = 256 * 1024
START_SECONDS = 60.0


@dataclass(frozen=True, slots=True)
class Result:
    """What one run took.

    Attributes:
        stores: How many loaded at once.
        seconds: Until the last one had everything.
        origin_bytes: Of weights, sent by the origin.
        peer_bytes: Of weights, sent by stores.
    """

    stores: int
    seconds: float
    origin_bytes: int
    peer_bytes: int


# --- the network ---


def run(*command: str) -> None:
    """Run a command of iproute2; raises with what it said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stderr.strip() or done.stdout.strip()}")


def enter_namespace() -> None:
    """Move this process into a new network namespace with a bridge, which lives and dies with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNET):
        raise SystemExit(f"cannot make a network namespace: {os.strerror(ctypes.get_errno())}; run as root")
    run("ip", "link", "set", "lo", "up")
    run("ip", "link", "add", BRIDGE, "type", "bridge")
    run("ip", "addr", "add", f"{GATEWAY}/24", "dev", BRIDGE)
    run("ip", "link", "set", BRIDGE, "up")


@contextmanager
def host(address: str, megabits: int, command: list[str], log: Path, **environment: str) -> Iterator[None]:
    """Run a process in a namespace of its own behind a shaped link; ended afterwards."""
    wait_for_link = ["sh", "-c", 'read _ && exec "$@"', "host"]
    with log.open("wb") as output:
        process = subprocess.Popen(
            ["unshare", "--net", *wait_for_link, *command],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            env={**os.environ, **environment},
            preexec_fn=_die_with_parent,  # noqa: PLW1509 - set before any thread of ours exists
        )
    try:
        _tie(process.pid, address, megabits)
        assert process.stdin is not None
        process.stdin.write(b"\n")
        process.stdin.close()
        yield
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _tie(pid: int, address: str, megabits: int) -> None:
    own = Path("/proc/self/ns/net").stat().st_ino
    deadline = time.monotonic() + START_SECONDS
    while Path(f"/proc/{pid}/ns/net").stat().st_ino == own:  # until `unshare` has done it
        if time.monotonic() > deadline:
            raise SystemExit("a process did not get a network namespace")
        time.sleep(0.01)
    link = f"fan{address.rpartition('.')[2]}"
    run("ip", "link", "add", link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
    run("ip", "link", "set", link, "master", BRIDGE, "up")
    inside = ("nsenter", "--net", "--target", str(pid))
    run(*inside, "ip", "link", "set", "lo", "up")
    run(*inside, "ip", "addr", "add", f"{address}/24", "dev", "eth0")
    run(*inside, "ip", "link", "set", "eth0", "up")
    shape = ("root", "tbf", "rate", f"{megabits}mbit", "burst", str(BURST_BYTES), "latency", "50ms")
    run("tc", "qdisc", "add", "dev", link, *shape)
    run(*inside, "tc", "qdisc", "add", "dev", "eth0", *shape)


# --- the origin ---


def serve_origin(folder: Path) -> None:
    """Serve a folder with ranges; `/sent` tells how many bytes of weights left."""
    sent = 0
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(body=False)

        def do_GET(self) -> None:
            if self.path == "/sent":
                text = str(sent).encode()
                self.send_response(200)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)
            else:
                self._answer(body=True)

        def _answer(self, *, body: bool) -> None:
            nonlocal sent
            path = folder / self.path.lstrip("/")
            if not path.is_file():
                self.send_error(404)
                return
            size = path.stat().st_size
            begin, end = 0, size
            asked = self.headers.get("Range", "")
            if asked.startswith("bytes="):
                first, _, last = asked.removeprefix("bytes=").partition("-")
                begin, end = int(first), min(size, int(last) + 1 if last else size)
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
            else:
                self.send_response(200)
            self.send_header("Accept-Ranges", "bytes")
            self.send_header("ETag", f'"{size}"')
            self.send_header("Content-Length", str(end - begin))
            self.end_headers()
            if not body:
                return
            self.wfile.flush()
            with path.open("rb") as file:
                self.connection.sendfile(file, begin, end - begin)
            if path.suffix == ".safetensors":
                with lock:
                    sent += end - begin

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 128  # the library's 5 drops connects of stores that ask at once: each costs 1 s

    Server((ORIGIN, ORIGIN_PORT), Handler).serve_forever()


def origin_sent() -> int:
    """Return how many bytes of weights the origin has sent; waits until it is up."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            with urlopen(f"http://{ORIGIN}:{ORIGIN_PORT}/sent", timeout=5) as answer:
                return int(answer.read())
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def write_checkpoint(folder: Path, megabytes: int) -> int:
    """Write a checkpoint of random bytes; returns the size of its weights.

    It is one in place, as most origins have them: peers check each other's chunks by the sender's digests.
    """
    source = folder / "checkpoint"
    source.mkdir()
    layers = 16
    each = megabytes * 1_000_000 // layers // 256 * 256
    table = {
        f"model.layers.{layer}.mlp.up_proj.weight": {
            "dtype": "U8",
            "shape": [each],
            "data_offsets": [layer * each, (layer + 1) * each],
        }
        for layer in range(layers)
    }
    header = json.dumps(table).encode()
    with (source / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        for _ in range(layers):
            file.write(os.urandom(each))
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": layers, "vocab_size": 8}
    (source / "config.json").write_text(json.dumps(config))
    return (source / "model.safetensors").stat().st_size


# --- the measurement ---


def measure(folder: Path, stores: int, *, megabits: int, size_bytes: int, chunk_bytes: int) -> Result:
    """Start so many fresh stores and let them all load at once."""
    addresses = [f"10.213.0.{FIRST_STORE + number}" for number in range(stores)]
    pool_bytes = (size_bytes // chunk_bytes + 8) * chunk_bytes
    with ExitStack() as running:
        for number, address in enumerate(addresses):
            settings = {
                "ADDRESS": f"{address}:{STORE_PORT}",
                "RUN_DIR": str(folder / f"run-{stores}-{number}"),
                "POOL_BYTES": str(pool_bytes),
                "CHUNK_BYTES": str(chunk_bytes),
                "PEER_ADDRESS": f"{address}:{PEER_PORT}",
                "PEERS": "[" + ",".join(f'"{each}:{PEER_PORT}"' for each in addresses) + "]",
            }
            environment = {f"STOKER_STORE_{name}": value for name, value in settings.items()}
            command = [sys.executable, "-m", "services.store"]
            log = folder / f"store-{stores}-{number}.log"
            running.enter_context(host(address, megabits, command, log, **environment))
        before = origin_sent()
        try:
            seconds, peer_bytes = asyncio.run(_load_everywhere(addresses))
        except BaseException:
            for number in range(stores):
                tail = (folder / f"store-{stores}-{number}.log").read_text(errors="replace")[-2000:]
                print(f"--- store {number}\n{tail}", file=sys.stderr)
            raise
        return Result(stores, seconds, origin_sent() - before, peer_bytes)


async def _load_everywhere(addresses: list[str]) -> tuple[float, int]:
    uri = f"http://{ORIGIN}:{ORIGIN_PORT}/checkpoint"
    channels = [connect(f"{address}:{STORE_PORT}") for address in addresses]
    try:
        async with asyncio.timeout(START_SECONDS):
            await asyncio.gather(*(channel.channel_ready() for channel in channels))
        await asyncio.sleep(1.0)  # the pool's pages come and peers are linked in the background
        began = time.monotonic()

        async def load(stub: CheckpointStoreStub) -> PrefetchResponse:
            return await stub.Prefetch(PrefetchRequest(uri=uri), timeout=600.0)

        answers = await asyncio.gather(*(load(CheckpointStoreStub(channel)) for channel in channels))
        seconds = time.monotonic() - began
    finally:
        for channel in channels:
            await channel.close()
    peer_bytes = sum(each.bytes for answer in answers for each in answer.transfers if each.tier == "peer")
    return seconds, peer_bytes


def main() -> int:
    """Print the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=positive, default=256, help="of weights")
    parser.add_argument("--megabits", type=positive, default=400, help="per second, of every link, each way")
    parser.add_argument("--chunk-mib", type=positive, default=4, help="of the stores' chunks")
    parser.add_argument("--stores", type=positive, nargs="+", default=[1, 2, 4])
    parser.add_argument("--logs", type=Path, help="a folder for what the stores log")
    parser.add_argument("--origin", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.origin is not None:
        serve_origin(options.origin)
        return 0
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter") if shutil.which(tool) is None]
    if os.geteuid() or missing:
        raise SystemExit(f"needs root and iproute2, util-linux (missing: {', '.join(missing) or 'root'})")
    enter_namespace()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="stoker-fanout-") as name:
        folder = Path(name)
        size_bytes = write_checkpoint(folder, options.megabytes)
        print_heading(
            f"{size_bytes / 1e6:.0f} MB of weights, every link {options.megabits} Mbit/s each way, "
            f"chunks of {options.chunk_mib} MiB"
        )
        command = [sys.executable, str(Path(__file__).resolve()), "--origin", str(folder)]
        with host(ORIGIN, options.megabits, command, folder / "origin.log"):
            results = []
            for stores in options.stores:
                result = measure(
                    folder,
                    stores,
                    megabits=options.megabits,
                    size_bytes=size_bytes,
                    chunk_bytes=options.chunk_mib * 2**20,
                )
                if not results:
                    print("stores  seconds  x one store  origin copies  from peers  GB/s all together")
                results.append(result)
                print(
                    f"{stores:6}  {result.seconds:7.2f}  {result.seconds / results[0].seconds:11.2f}  "
                    f"{result.origin_bytes / size_bytes:13.3f}  {result.peer_bytes / 1e6:7.0f} MB  "
                    f"{stores * size_bytes / result.seconds / 1e9:17.3f}",
                    flush=True,
                )
        if options.logs is not None:
            options.logs.mkdir(parents=True, exist_ok=True)
            for log in folder.glob("*.log"):
                shutil.copy(log, options.logs)
    one = next((each.seconds for each in results if each.stores == 1), results[0].seconds)
    ratio = max(result.seconds for result in results) / one
    copies = max(result.origin_bytes for result in results) / size_bytes
    met = ratio <= TARGET_RATIO and copies <= TARGET_COPIES
    print(
        f"\n{max(options.stores)} stores: {ratio:.2f} x the time of one (target: at most {TARGET_RATIO}), "
        f"{copies:.3f} copies from the origin (target: 1): {'met' if met else 'MISSED'}"
    )
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
