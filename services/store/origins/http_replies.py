"""What an HTTP answer means for a range that was asked for. Pure: status and headers in, a verdict out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime

from services.store.origins.origin import Broken, OriginChanged, OriginRefused, RemoteFile
from stoker.errors import NotFound, StokerError

OK, PARTIAL = 200, 206
REDIRECTS = frozenset({301, 302, 303, 307, 308})
_UNAUTHORIZED, _FORBIDDEN, _NOT_FOUND, _GONE = 401, 403, 404, 410
_PRECONDITION_FAILED, _RANGE_UNSATISFIABLE = 412, 416
_TRY_AGAIN = frozenset({408, 425, 429, 500, 502, 503, 504})
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Wanted:
    """A range that was asked for.

    Attributes:
        url: For messages.
        file: As it was when the checkpoint was opened.
        begin: First byte.
        end: One past the last byte.
    """

    url: str
    file: RemoteFile
    begin: int
    end: int


def version_of(headers: Mapping[str, str]) -> str:
    """Return what changes when the file does: the entity tag, else the time of the last change, else ""."""
    return headers.get("etag") or headers.get("last-modified") or ""


def conditions(version: str) -> dict[str, str]:
    """Return the headers that make a server refuse to send another file than the one of `version`."""
    if version.startswith('"'):
        return {"If-Match": version}
    if version and not version.startswith("W/"):
        return {"If-Unmodified-Since": version}
    return {}  # a weak tag cannot be required; the answer's tag is compared instead


def retry_after_seconds(headers: Mapping[str, str], *, now_unix_seconds: float) -> float | None:
    """Return what Retry-After asks for, as seconds from now; None when there is none that can be read."""
    text = headers.get("retry-after", "").strip()
    if not text:
        return None
    if text.isascii() and text.isdigit():
        return float(text)
    try:
        return max(0.0, parsedate_to_datetime(text).timestamp() - now_unix_seconds)
    except ValueError:
        return None


def fault(
    status: int, headers: Mapping[str, str], *, url: str, now_unix_seconds: float
) -> StokerError | None:
    """Return the error that a status means, or None for 200 and 206.

    Args:
        status: Of the answer, redirects followed.
        headers: Of the answer, names in lower case.
        url: For the message; without its query.
        now_unix_seconds: For a Retry-After that is a date.
    """
    if status in {OK, PARTIAL}:
        return None
    if status in {_UNAUTHORIZED, _FORBIDDEN}:
        return OriginRefused(
            f"{url}: the origin answers {status}: it doesn't let this store read there; give the store "
            "credentials that may, in its environment"
        )
    if status in {_NOT_FOUND, _GONE}:
        return NotFound(f"{url}: the origin answers {status}: there is no such file; check the uri")
    if status in {_PRECONDITION_FAILED, _RANGE_UNSATISFIABLE}:
        return changed(url)
    if status in _TRY_AGAIN:
        return Broken(
            f"{url}: the origin answers {status}",
            retry_after_seconds=retry_after_seconds(headers, now_unix_seconds=now_unix_seconds),
        )
    return OriginRefused(f"{url}: the origin answers {status}, which no checkpoint's file does")


def range_fault(wanted: Wanted, status: int, headers: Mapping[str, str]) -> StokerError | None:
    """Return what is wrong with a successful answer to a ranged request, or None.

    Args:
        wanted: What was asked for.
        status: 200 or 206.
        headers: Of the answer, names in lower case.
    """
    found = version_of(headers)
    if wanted.file.version and found and found != wanted.file.version:
        return changed(wanted.url)
    if status == OK:
        whole = (wanted.begin, wanted.end) == (0, wanted.file.size_bytes)
        return None if whole and headers.get("content-length") == str(wanted.end) else _ignored(wanted.url)
    match = _CONTENT_RANGE.fullmatch(headers.get("content-range", ""))
    if match is not None and match[3] not in {"*", str(wanted.file.size_bytes)}:
        return changed(wanted.url)
    if match is None or (int(match[1]), int(match[2]) + 1) != (wanted.begin, wanted.end):
        return OriginRefused(
            f"{wanted.url}: asked for bytes {wanted.begin}-{wanted.end - 1}, the origin sends "
            f"{headers.get('content-range', 'some part of the file')[:100]}"
        )
    return None


def _ignored(url: str) -> OriginRefused:
    return OriginRefused(
        f"{url}: the origin ignores Range and sends the whole file; put the checkpoint on a server that "
        "serves ranges (RFC 9110, 14.2), an object store for instance"
    )


def changed(url: str) -> OriginChanged:
    """Return the error for a file that is another one now."""
    return OriginChanged(
        f"{url} was changed at the origin since the checkpoint was opened; deploy the model again to serve "
        "the new one"
    )
