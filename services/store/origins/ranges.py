"""Ranges of an origin's files, tried again where that may help, resumed where they stopped.

Attempts without a byte of progress are bounded; one that got further starts the count anew, because the file
is finite. Pauses double and are jittered, so that many stores don't come back at one moment; what the origin
asks for by Retry-After is honoured, unless it is too long to wait for.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import TypeVar

from services.store.origins.origin import Broken, Origin, RemoteFile, Told
from stoker.errors import CheckpointInvalid, PeerError
from stoker.units import format_bytes

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """How often, and how long apart.

    Attributes:
        attempts: At most so many in a row that bring nothing.
        first_seconds: Pause after the first one.
        most_seconds: No pause is longer; an origin that asks for more is given up.
    """

    attempts: int = 5
    first_seconds: float = 0.2
    most_seconds: float = 20.0


def pause_seconds(retry: Retry, *, failures: int, asked_seconds: float | None, dice: float) -> float | None:
    """Return how long to wait before the next attempt, or None to give up; pure.

    Args:
        retry: The policy.
        failures: Attempts in a row that brought nothing; at least 1.
        asked_seconds: What the origin asked for.
        dice: Uniform in 0 … 1.
    """
    if failures >= retry.attempts or (asked_seconds or 0.0) > retry.most_seconds:
        return None
    doubled = min(retry.most_seconds, retry.first_seconds * 2.0 ** (failures - 1))
    return min(retry.most_seconds, max(asked_seconds or 0.0, 0.0) + doubled * (0.5 + 0.5 * dice))


class Ranges:
    """Reads from one origin with patience; any thread."""

    def __init__(
        self,
        origin: Origin,
        *,
        retry: Retry,
        stopped: threading.Event,
        told: Callable[[Broken], None] = lambda _error: None,
    ) -> None:
        """Args: stopped: set when nobody wants anything any more. told: of every attempt that failed."""
        self.origin = origin
        self._retry = retry
        self._stopped = stopped
        self._told = told

    def find(self, names: Collection[str]) -> dict[str, RemoteFile]:
        """Return those of `names` that are there; see `Origin.find`.

        Raises:
            StokerError: As `Origin.find`; PeerError when it never worked.
        """
        failures = 0
        while True:
            try:
                return self.origin.find(names)
            except Broken as error:
                failures += 1
                self._pause(error, failures)

    def read_into(self, file: RemoteFile, into: memoryview, *, offset: int, told: Told | None = None) -> None:
        """Fill `into` from `offset` of `file`; goes on where an attempt stopped.

        Raises:
            StokerError: As `Origin.read_into`; PeerError when it never came to an end.
        """
        done, failures = 0, 0
        while done < len(into):
            try:
                further = None if told is None else _from(done, told)
                self.origin.read_into(file, into[done:], offset=offset + done, told=further)
            except Broken as error:
                failures = 1 if error.done_bytes else failures + 1
                done += error.done_bytes
                self._pause(error, failures)
            else:
                return

    def read_whole(self, file: RemoteFile, *, limit_bytes: int) -> bytes:
        """Return the content of a small file.

        Raises:
            CheckpointInvalid: It is larger than `limit_bytes`.
            StokerError: As `read_into`.
        """
        if file.size_bytes > limit_bytes:
            raise CheckpointInvalid(
                f"{self.origin.uri}/{file.name} has {format_bytes(file.size_bytes)}; such a file may have "
                f"{format_bytes(limit_bytes)}: it is not what its name says"
            )
        content = bytearray(file.size_bytes)
        self.read_into(file, memoryview(content), offset=0)
        return bytes(content)

    def _pause(self, error: Broken, failures: int) -> None:
        self._told(error)
        seconds = pause_seconds(
            self._retry,
            failures=failures,
            asked_seconds=error.retry_after_seconds,
            dice=random.random(),  # noqa: S311 - jitter, no secret
        )
        if seconds is None:
            raise PeerError(
                f"{error.message} (tried {failures} times in a row); check that the store's host reaches it, "
                "or try again later",
                retry_after_seconds=error.retry_after_seconds or self._retry.most_seconds,
            ) from error
        if self._stopped.wait(seconds):
            raise PeerError(f"{self.origin.uri}: the store is being stopped", retry_after_seconds=1.0)


def _from(begin_bytes: int, told: Told) -> Told:
    """Return a `Told` for the rest of a range."""
    return lambda arrived_bytes: told(begin_bytes + arrived_bytes)
