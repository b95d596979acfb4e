"""A checkpoint's folder on an HTTP server: `http(s)://host/path/of/folder`."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote

from services.store.origins.http_client import HttpClient, without_query
from services.store.origins.http_replies import Wanted, conditions, fault, range_fault, version_of
from services.store.origins.origin import OriginRefused, RemoteFile, Told
from stoker.errors import NotFound

_FINDERS = 8
"""Questions at a time: HTTP has no listing, so each name is asked for."""


class HttpOrigin:
    """See `Origin`."""

    def __init__(
        self,
        uri: str,
        *,
        timeout_seconds: float,
        url_of: Callable[[str], str] | None = None,
        headers: Mapping[str, str] | None = None,
        unix_seconds: Callable[[], float] = time.time,
    ) -> None:
        """Open nothing yet.

        Args:
            uri: Of the folder.
            timeout_seconds: Of a connect, and of each wait for bytes.
            url_of: Gives a file's URL; default: below `uri`.
            headers: Sent with every request to the folder's host.
            unix_seconds: The clock.
        """
        self._uri = uri.rstrip("/")
        self._url_of = url_of or (lambda name: f"{self._uri}/{quote(name)}")
        self._headers = dict(headers or {})
        self._unix_seconds = unix_seconds
        self._client = HttpClient(timeout_seconds=timeout_seconds)

    @property
    def uri(self) -> str:
        """See `Origin`."""
        return self._uri

    def find(self, names: Collection[str]) -> dict[str, RemoteFile]:
        """See `Origin`."""
        with ThreadPoolExecutor(max_workers=_FINDERS, thread_name_prefix="origin-find") as threads:
            found = threads.map(self._head, names)
        return {file.name: file for file in found if file is not None}

    def read_into(self, file: RemoteFile, into: memoryview, *, offset: int, told: Told | None = None) -> None:
        """See `Origin`."""
        if not len(into):
            return
        end = offset + len(into)
        headers = {**self._headers, "Range": f"bytes={offset}-{end - 1}", **conditions(file.version)}
        with self._client.request("GET", self._url_of(file.name), headers) as answer:
            url, now = without_query(answer.url), self._unix_seconds()
            wanted = Wanted(url=url, file=file, begin=offset, end=end)
            error = fault(answer.status, answer.headers, url=url, now_unix_seconds=now) or range_fault(
                wanted, answer.status, answer.headers
            )
            if error is not None:
                raise error
            answer.fill(into, told)

    def close(self) -> None:
        """See `Origin`."""
        self._client.close()

    def _head(self, name: str) -> RemoteFile | None:
        with self._client.request("HEAD", self._url_of(name), self._headers) as answer:
            url = without_query(answer.url)
            answer.response.read()
            error = fault(answer.status, answer.headers, url=url, now_unix_seconds=self._unix_seconds())
            if isinstance(error, NotFound):
                return None
            if error is not None:
                raise error
            length = answer.headers.get("content-length", "")
            if not (length.isascii() and length.isdigit()):
                raise OriginRefused(f"{url}: the origin doesn't say how large the file is")
            return RemoteFile(name=name, size_bytes=int(length), version=version_of(answer.headers))
