"""HTTP connections that are kept, and bodies that are received straight into the caller's memory.

The standard library's client, because it is the only one at hand that receives into given memory
(`readinto`); it blocks, as reader threads do. Proxies are taken from the environment.
"""

from __future__ import annotations

import base64
import http.client
import netrc
import os
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from urllib.parse import SplitResult, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from services.store.origins.http_replies import REDIRECTS
from services.store.origins.origin import TOLD_BYTES, Broken, OriginRefused, Told

MAX_REDIRECTS = 5
MAX_IDLE = 16
"""Connections kept per client, whatever the host."""

PIECE_BYTES = 1024 * 1024
"""Received at a time: what is known to have arrived when a connection breaks."""

_SECRET_HEADERS = frozenset({"authorization", "cookie"})
_Key = tuple[str, str]


@dataclass(slots=True, kw_only=True)
class Answer:
    """An answer whose body has not been read.

    Attributes:
        status: HTTP status.
        headers: Names in lower case.
        url: Where it came from in the end.
        response: The body.
    """

    status: int
    headers: Mapping[str, str]
    url: str
    response: http.client.HTTPResponse = field(repr=False)

    def fill(self, into: memoryview, told: Told | None = None) -> None:
        """Receive exactly `into`'s length, telling `told` of it on the way.

        Raises:
            Broken: The connection broke or ended before; says how many bytes arrived.
        """
        done = 0
        step_bytes = PIECE_BYTES if told is None else TOLD_BYTES  # read whole, however slowly they come
        while done < len(into):
            try:
                count = self.response.readinto(into[done : done + step_bytes])
            except (OSError, http.client.HTTPException) as error:
                raise Broken(f"{without_query(self.url)}: {_reason(error)}", done_bytes=done) from error
            if count == 0:
                raise Broken(
                    f"{without_query(self.url)}: the origin hung up after {done:,} of {len(into):,} bytes",
                    done_bytes=done,
                )
            done += count
            if told is not None:
                told(done)


class HttpClient:
    """Keeps connections between requests; any thread."""

    def __init__(self, *, timeout_seconds: float) -> None:
        """Args: timeout_seconds: of a connect, and of each wait for bytes."""
        self._timeout_seconds = timeout_seconds
        self._tls = ssl.create_default_context()
        self._lock = threading.Lock()
        self._idle: list[tuple[_Key, http.client.HTTPConnection]] = []
        self._closed = False
        self._netrc = _read_netrc()

    @contextmanager
    def request(self, method: str, url: str, headers: Mapping[str, str]) -> Iterator[Answer]:
        """Send a request and yield the answer, redirects followed.

        The connection is kept when the body was read to its end. Secret headers don't follow a redirect to
        another host.

        Raises:
            Broken: The origin cannot be reached, or breaks off.
            OriginRefused: It redirects in circles, or to another protocol.
        """
        sent = {"Accept-Encoding": "identity", "User-Agent": "stoker", **headers}
        for _ in range(MAX_REDIRECTS + 1):
            key, connection, response = self._send(method, url, sent)
            location = response.headers.get("location")
            if response.status not in REDIRECTS or location is None:
                break
            connection.close()
            target = urljoin(url, location)
            if not _may_follow(urlsplit(url), urlsplit(target)):
                raise OriginRefused(
                    f"{without_query(url)} redirects to {without_query(target)}: not followed"
                )
            if urlsplit(url).netloc != urlsplit(target).netloc:
                sent = {name: value for name, value in sent.items() if name.lower() not in _SECRET_HEADERS}
            url = target
        else:
            raise OriginRefused(f"{without_query(url)}: more than {MAX_REDIRECTS} redirects")
        lowered = {name.lower(): value for name, value in response.headers.items()}
        try:
            yield Answer(status=response.status, headers=lowered, url=url, response=response)
        finally:
            self._keep(key, connection, response)

    def close(self) -> None:
        """Close what is idle and keep nothing from now on."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()

    def _send(
        self, method: str, url: str, headers: Mapping[str, str]
    ) -> tuple[_Key, http.client.HTTPConnection, http.client.HTTPResponse]:
        parts = urlsplit(url)
        key = (parts.scheme, parts.netloc)
        connection = self._take(key)
        if connection is not None:
            # The server may have closed it meanwhile: then, and only then, a new one is tried at once.
            with suppress(OSError, http.client.HTTPException):
                return key, connection, self._exchange(connection, method, parts, headers)
            connection.close()
        connection = self._connect(parts)
        try:
            return key, connection, self._exchange(connection, method, parts, headers)
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            raise Broken(f"{without_query(url)}: {_reason(error)}") from error

    def _exchange(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        parts: SplitResult,
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        if parts.scheme == "http" and _proxy(parts):
            target = f"http://{parts.netloc}{target}"
        connection.request(method, target, headers={**self._basic(parts), **headers})
        return connection.getresponse()

    def _connect(self, parts: SplitResult) -> http.client.HTTPConnection:
        proxy = _proxy(parts)
        at = proxy or parts
        host, port = at.hostname or "", at.port
        if parts.scheme == "http":
            return http.client.HTTPConnection(host, port, timeout=self._timeout_seconds)
        connection = http.client.HTTPSConnection(host, port, timeout=self._timeout_seconds, context=self._tls)
        if proxy is not None:
            connection.set_tunnel(parts.hostname or "", parts.port)
        return connection

    def _basic(self, parts: SplitResult) -> dict[str, str]:
        """Return the credentials that $NETRC or ~/.netrc has for the host."""
        found = self._netrc.authenticators(parts.hostname or "") if self._netrc else None
        if found is None:
            return {}
        return {"Authorization": "Basic " + base64.b64encode(f"{found[0]}:{found[2]}".encode()).decode()}

    def _take(self, key: _Key) -> http.client.HTTPConnection | None:
        with self._lock:
            for at, (found, connection) in enumerate(self._idle):
                if found == key:
                    del self._idle[at]
                    return connection
        return None

    def _keep(
        self, key: _Key, connection: http.client.HTTPConnection, response: http.client.HTTPResponse
    ) -> None:
        with self._lock:
            # Read to its end, a response lets its file go; the socket stays unless the server ends it.
            usable = response.isclosed() and connection.sock is not None
            if usable and not self._closed and len(self._idle) < MAX_IDLE:
                self._idle.append((key, connection))
                return
        connection.close()


def without_query(url: str) -> str:
    """Return `url` as it may be shown: signatures and tokens travel in queries and user infos."""
    parts = urlsplit(url)
    host = parts.netloc.rpartition("@")[2]
    return f"{parts.scheme}://{host}{parts.path}"


def _may_follow(here: SplitResult, there: SplitResult) -> bool:
    return there.scheme == here.scheme or (here.scheme, there.scheme) == ("http", "https")


def _proxy(parts: SplitResult) -> SplitResult | None:
    url = getproxies().get(parts.scheme)
    if not url or proxy_bypass(parts.netloc.rpartition("@")[2]):
        return None
    return urlsplit(url if "://" in url else f"http://{url}")


def _read_netrc() -> netrc.netrc | None:
    try:
        return netrc.netrc(os.environ.get("NETRC"))
    except (OSError, netrc.NetrcParseError):
        return None


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
