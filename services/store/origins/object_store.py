"""A checkpoint's folder in an object store, or on a shared file system, through obstore.

`s3://bucket/prefix`, `gs://bucket/prefix`, `az://container/prefix`: credentials, endpoints and regions come
from the environment by the names that each vendor's own tools use. obstore tries again by itself what an
answer of 429 or 5xx says may be tried again; what it gives up is tried again by `ranges`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from services.store.origins.http_replies import changed, fault
from services.store.origins.origin import TOLD_BYTES, Broken, OriginRefused, RemoteFile, Told
from stoker.errors import ConfigError, NotFound, StokerError
from stoker.object_stores import import_obstore, reason_of

if TYPE_CHECKING:
    from obstore.store import ObjectStore

MAX_LISTED = 100_000
"""Objects in a checkpoint's folder; more are not a checkpoint."""

PIECE_BYTES = 4 * 1024 * 1024
_WHOLE_ANSWER = "non-partial response"
"""What obstore says of a server that sends all of an object though a range was asked for; a text, no kind."""

_STATUS = re.compile(r"status(?: code)?:? (\d{3})\b")
_TIMES_FOR_A_RANGE = 4
"""obstore limits a whole request, not the wait for its next bytes: a range over a slow link needs longer."""

_ALLOW_HTTP = {"s3": "AWS_ALLOW_HTTP", "gs": "GOOGLE_ALLOW_HTTP", "az": "AZURE_ALLOW_HTTP"}
"""Options given here replace those that obstore takes from the environment: this one is looked up again."""


def cloud_store(uri: str, *, timeout_seconds: float) -> ObjectStore:
    """Return obstore's store for the folder at `uri`; opens no connection.

    Raises:
        ConfigError: obstore is not installed, or the environment's settings for it are wrong.
    """
    obstore = import_obstore()
    try:
        return cast(
            "ObjectStore",
            obstore.store.from_url(
                uri,
                client_options={
                    "connect_timeout": timedelta(seconds=timeout_seconds),
                    "timeout": timedelta(seconds=_TIMES_FOR_A_RANGE * timeout_seconds),
                    "allow_http": os.environ.get(_ALLOW_HTTP[uri.partition("://")[0]], "").lower() == "true",
                },
                retry_config={"max_retries": 3, "retry_timeout": timedelta(seconds=timeout_seconds)},
            ),
        )
    except (obstore.exceptions.BaseError, ValueError) as error:
        raise ConfigError(f"{uri} cannot be opened: {reason_of(error)}; check the environment") from error


def folder_store(folder: Path) -> ObjectStore:
    """Return obstore's store for a folder that this host sees.

    Raises:
        ConfigError: obstore is not installed.
        NotFound: There is no such folder.
    """
    obstore = import_obstore()
    if not folder.is_dir():
        raise NotFound(f"{folder} is not a folder. Give the folder that holds config.json.")
    return cast("ObjectStore", obstore.store.LocalStore(folder))


class ObjectStoreOrigin:
    """See `Origin`."""

    def __init__(self, uri: str, open_store: Callable[[], ObjectStore]) -> None:
        """Args: uri: of the folder. open_store: gives the store rooted there."""
        self._uri = uri.rstrip("/")
        self._obstore = import_obstore()
        self._store = open_store()

    @property
    def uri(self) -> str:
        """See `Origin`."""
        return self._uri

    def find(self, names: Collection[str]) -> dict[str, RemoteFile]:
        """See `Origin`; one listing answers for all names."""
        wanted = set(names)
        try:
            listed = self._obstore.list_with_delimiter(self._store)["objects"]
        except Exception as error:
            raise self._fault(error, "") from error
        if len(listed) > MAX_LISTED:
            raise OriginRefused(f"{self._uri} holds more than {MAX_LISTED:,} objects: it is no checkpoint")
        if not listed:
            raise NotFound(f"{self._uri}: there is nothing; check the uri")
        found = (
            RemoteFile(
                name=meta["path"].rpartition("/")[2],
                size_bytes=int(meta["size"]),
                version=meta.get("e_tag") or str(meta["last_modified"]),
            )
            for meta in listed
        )
        return {file.name: file for file in found if file.name in wanted}

    def read_into(self, file: RemoteFile, into: memoryview, *, offset: int, told: Told | None = None) -> None:
        """See `Origin`."""
        if not len(into):
            return
        done = 0
        options: dict[str, Any] = {"range": (offset, offset + len(into))}
        if file.version.startswith('"'):
            options["if_match"] = file.version
        try:
            answer = self._obstore.get(self._store, file.name, options=options)
            self._check(answer, file, offset, len(into))
            step_bytes = PIECE_BYTES if told is None else TOLD_BYTES
            for piece in answer.stream(min_chunk_size=step_bytes):
                into[done : done + len(piece)] = piece
                done += len(piece)
                if told is not None:
                    told(done)
        except StokerError:
            raise
        except Exception as error:
            raise self._fault(error, file.name, done_bytes=done) from error
        if done != len(into):
            raise Broken(
                f"{self._uri}/{file.name} ended after {done:,} of {len(into):,} bytes", done_bytes=done
            )

    def close(self) -> None:
        """See `Origin`; obstore's connections end with the store."""

    def _check(self, answer: Any, file: RemoteFile, offset: int, length: int) -> None:
        url = f"{self._uri}/{file.name}"
        tag = answer.meta.get("e_tag")
        if answer.meta["size"] != file.size_bytes or (tag and file.version and tag != file.version):
            raise changed(url)
        if tuple(answer.range) != (offset, offset + length):
            raise OriginRefused(f"{url}: asked for {length} bytes from {offset}, got {tuple(answer.range)}")

    def _fault(self, error: Exception, name: str, *, done_bytes: int = 0) -> StokerError:
        kinds = self._obstore.exceptions
        url = f"{self._uri}/{name}" if name else self._uri
        match error:
            case kinds.NotFoundError() | FileNotFoundError():
                return NotFound(f"{url}: there is no such object; check the uri")
            case kinds.PermissionDeniedError() | kinds.UnauthenticatedError() | PermissionError():
                return OriginRefused(
                    f"{url}: the object store doesn't let this store read there; give the store credentials "
                    "that may, in its environment"
                )
            case kinds.PreconditionError():
                return changed(url)
            case kinds.NotSupportedError():
                return OriginRefused(f"{url}: {reason_of(error)}")
        return _untyped_fault(str(error), url) or Broken(f"{url}: {reason_of(error)}", done_bytes=done_bytes)


def _untyped_fault(text: str, url: str) -> StokerError | None:
    """Return what is final by an error's text, where obstore has no kind for it; None when it may pass."""
    if _WHOLE_ANSWER in text:
        return OriginRefused(
            f"{url}: the object store ignores Range, so a checkpoint cannot be read from it in parts; "
            "serve it from one that knows ranges"
        )
    status = _STATUS.search(text)  # a listing's error
    told = fault(int(status[1]), {}, url=url, now_unix_seconds=0.0) if status else None
    return None if isinstance(told, Broken) else told
