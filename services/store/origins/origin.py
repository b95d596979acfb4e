"""What every origin can do: say which files are there, and read a range of one into the caller's memory.

Origins block and are used from several threads at once. They make one attempt; `ranges` tries again.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Protocol

from stoker.errors import CallerError, PeerError


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteFile:
    """A file at an origin.

    Attributes:
        name: In the checkpoint's folder.
        size_bytes: Whole size.
        version: Changes when the content does: an entity tag, a blob id, a time; empty when the origin
            tells none.
    """

    name: str
    size_bytes: int
    version: str


Told = Callable[[int], None]
"""Told, again and again, how many bytes of a range have arrived, counted from its start; must not block."""

TOLD_BYTES = 256 * 1024
"""Whoever is told is told at least this often."""


class Origin(Protocol):
    """A checkpoint's folder, far away."""

    @property
    def uri(self) -> str:
        """As the checkpoint is known by; holds no credentials."""

    def find(self, names: Collection[str]) -> dict[str, RemoteFile]:
        """Return those of `names` that are there, as they are now.

        Raises:
            Broken: It did not work this time.
            NotFound: There is no such folder, as far as the origin can tell.
            OriginRefused: The origin doesn't let this store read there.
        """

    def read_into(self, file: RemoteFile, into: memoryview, *, offset: int, told: Told | None = None) -> None:
        """Fill `into` from `offset` of `file`, from its first byte to its last.

        Args:
            file: Which.
            into: As long as the range.
            offset: Of the range's first byte.
            told: Told of bytes as they arrive; None = nobody wants to know.

        Raises:
            Broken: It did not work this time; says how many bytes arrived.
            NotFound: The file is gone.
            OriginRefused: The origin doesn't let this store read it.
            OriginChanged: The file is another one now.
        """

    def close(self) -> None:
        """Give up connections; reads that run may fail. Idempotent."""


class OriginRefused(CallerError):
    """The origin doesn't let this store read, or can't serve what it asks for."""

    code = "origin_refused"


class OriginChanged(CallerError):
    """A file at the origin is another one than when the checkpoint was opened."""

    code = "origin_changed"


class Broken(PeerError):
    """One attempt failed; another may not.

    Args:
        message: What happened.
        done_bytes: Bytes that arrived, counted from the start of the range.
        retry_after_seconds: What the origin asks for; None when it says nothing.
    """

    code = "origin_unavailable"

    def __init__(
        self, message: str, *, done_bytes: int = 0, retry_after_seconds: float | None = None
    ) -> None:
        super().__init__(message, retry_after_seconds=retry_after_seconds)
        self.done_bytes = done_bytes
