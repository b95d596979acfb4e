"""A small HTTP origin that serves a folder with ranges, counts what it sends, and fails on demand."""

from __future__ import annotations

import re
import socket
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

HOLD_SECONDS = 60.0
"""Connections that are held end by then."""


@dataclass(slots=True, kw_only=True)
class Fault:
    """What happens to one GET instead of a good answer.

    Attributes:
        status: Answer this.
        retry_after: With this Retry-After.
        cut_after: Send so many bytes of the body, then hang up.
        wrong: Send other bytes.
        whole: Ignore Range.
    """

    status: int = 0
    retry_after: str = ""
    cut_after: int | None = None
    wrong: bool = False
    whole: bool = False


@dataclass(slots=True)
class OriginServer:
    """What it serves and what it did.

    Attributes:
        folder: Its files.
        url: Of the folder.
        sent: Bytes of bodies sent, by file name.
        gets: Ranges asked for, by file name.
        faults: Of the next GETs, by file name.
        always: A fault for every GET, by file name.
        heads: A status for every HEAD, by file name.
        gate: Called before each GET of weights, with its name and first byte; may block.
        tags: Whether entity tags are told.
        hold_after: Bytes of weights, counted as in `sent`, after which nothing more is sent; None = no end.
        held: Set when a body was cut off there; its connection stays silent.
        let_go: Ends connections that are held.
        connections: Those that are open now.
    """

    folder: Path
    url: str = ""
    sent: Counter[str] = field(default_factory=Counter)
    gets: dict[str, list[tuple[int, int]]] = field(default_factory=dict)
    faults: dict[str, deque[Fault]] = field(default_factory=dict)
    always: dict[str, Fault] = field(default_factory=dict)
    heads: dict[str, int] = field(default_factory=dict)
    gate: Callable[[str, int], None] = lambda _name, _begin: None
    tags: bool = True
    hold_after: int | None = None
    held: threading.Event = field(default_factory=threading.Event)
    let_go: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)
    connections: int = 0

    def settle(self) -> None:
        """Wait until every connection made so far has ended: what a killed client asked for is counted then.

        Connections are taken in the order they were made, so one of ours is the last to be waited for.
        """
        host, _, port = self.url.removeprefix("http://").partition("/")[0].partition(":")
        with socket.create_connection((host, int(port)), timeout=HOLD_SECONDS) as last:
            last.sendall(b"HEAD /nothing HTTP/1.0\r\n\r\n")
            while last.recv(4096):
                pass
        deadline = time.monotonic() + HOLD_SECONDS
        while self.connections:
            assert time.monotonic() < deadline, f"{self.connections} connections are still open"
            time.sleep(0.005)

    def weights_sent(self) -> int:
        """Bytes of weights files sent."""
        with self.lock:
            return sum(count for name, count in self.sent.items() if name.endswith(".safetensors"))

    def take(self, name: str, wanted: int) -> int:
        """Count up to `wanted` bytes of a file as sent; returns how many may be."""
        with self.lock:
            weights = sum(count for file, count in self.sent.items() if file.endswith(".safetensors"))
            if self.hold_after is not None and name.endswith(".safetensors"):
                wanted = min(wanted, max(0, self.hold_after - weights))
            self.sent[name] += wanted
        return wanted

    def fault_of(self, name: str) -> Fault:
        """The fault of this GET."""
        with self.lock:
            queue = self.faults.get(name)
            return queue.popleft() if queue else self.always.get(name, Fault())


def tag_of(path: Path) -> str:
    """The entity tag of a file: changes with its size and time."""
    status = path.stat()
    return f'"{status.st_size:x}-{status.st_mtime_ns:x}"'


def serve_file(handler: BaseHTTPRequestHandler, server: OriginServer, name: str) -> None:
    """Answer a GET or HEAD for a file of the folder."""
    path = server.folder / name
    size = path.stat().st_size if path.is_file() else None
    get = handler.command == "GET"
    fault = server.fault_of(name) if get else Fault(status=server.heads.get(name, 0))
    begin, end = 0, size or 0
    found = re.fullmatch(r"bytes=(\d+)-(\d+)", handler.headers.get("Range", ""))
    tag = "" if size is None else tag_of(path)
    expected = handler.headers.get("If-Match")
    status = fault.status or (404 if size is None else 200)
    if status == 200 and server.tags and expected not in {None, tag}:
        status = 412
    if status == 200 and found and not fault.whole:
        status, begin, end = 206, int(found[1]), min(end, int(found[2]) + 1)
    length = end - begin if status in {200, 206} else 0
    if get and name.endswith(".safetensors"):
        server.gate(name, begin)
        with server.lock:
            server.gets.setdefault(name, []).append((begin, end))
    handler.send_response(status)
    handler.send_header("Content-Length", str(length))
    if status == 206:
        handler.send_header("Content-Range", f"bytes {begin}-{end - 1}/{size}")
    if server.tags and size is not None:
        handler.send_header("ETag", tag)
    if fault.retry_after:
        handler.send_header("Retry-After", fault.retry_after)
    handler.end_headers()
    if not get or not length:
        return
    with path.open("rb") as file:
        file.seek(begin)
        body = file.read(length)
    if fault.wrong:
        body = bytes(byte ^ 1 for byte in body[:64]) + body[64:]
    if fault.cut_after is not None:
        body = body[: fault.cut_after]
        handler.close_connection = True
    _send(handler, server, name, body)


def _send(handler: BaseHTTPRequestHandler, server: OriginServer, name: str, body: bytes) -> None:
    sent = server.take(name, len(body))
    handler.wfile.write(body[:sent])
    if sent < len(body):
        handler.wfile.flush()
        handler.close_connection = True
        server.held.set()
        server.let_go.wait(HOLD_SECONDS)


@contextmanager
def origin_server(
    folder: Path, serve: Callable[[BaseHTTPRequestHandler, OriginServer], None] | None = None
) -> Iterator[OriginServer]:
    """Serve `folder` on a free port of this host; `serve` answers in its own way."""
    made = OriginServer(folder)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle(self) -> None:
            try:
                super().handle()
            finally:
                with made.lock:
                    made.connections -= 1

        def answer(self) -> None:
            try:
                if serve is not None:
                    serve(self, made)
                else:
                    serve_file(self, made, self.path.rpartition("/")[2])
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True

        do_GET = do_HEAD = answer  # noqa: N815 - the names that http.server calls

        def log_message(self, *_args: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def process_request(self, *request: Any) -> None:
            with made.lock:
                made.connections += 1
            super().process_request(*request)

    http = Server(("127.0.0.1", 0), Handler)
    http.daemon_threads = True
    http.handle_error = lambda *_args: None  # a daemon that was killed leaves broken connections
    made.url = f"http://127.0.0.1:{http.server_address[1]}/models/one"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield made
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
