"""A weights file at an origin, as a source of chunks."""

from __future__ import annotations

import time
from collections.abc import Callable

from services.store.origins.origin import RemoteFile, Told
from services.store.origins.ranges import Ranges
from stoker.checkpoint.reading import ReadPart
from stoker.errors import LoadFailed, StokerError

REMOTE = "remote"


class OriginSource:
    """See `ChunkSource`."""

    def __init__(
        self, ranges: Ranges, file: RemoteFile, *, now: Callable[[], float] = time.monotonic
    ) -> None:
        """Args: ranges: of the file's origin, which outlives this. now: monotonic seconds."""
        self._ranges = ranges
        self._file = file
        self._now = now

    @property
    def name(self) -> str:
        """See `ChunkSource`."""
        return f"{self._ranges.origin.uri}/{self._file.name}"

    def read(self, chunk: memoryview, *, offset: int, length: int) -> list[ReadPart]:
        """See `ChunkSource`."""
        return self.read_gradually(chunk, offset=offset, length=length, told=None)

    def read_gradually(
        self, chunk: memoryview, *, offset: int, length: int, told: Told | None
    ) -> list[ReadPart]:
        """See `GradualSource`."""
        began = self._now()
        try:
            self._ranges.read_into(self._file, chunk[:length], offset=offset, told=told)
        except StokerError as error:
            raise LoadFailed(error.message, retry_after_seconds=error.retry_after_seconds) from error
        return [ReadPart(tier=REMOTE, byte_count=length, began_seconds=began, ended_seconds=self._now())]

    def close(self) -> None:
        """See `ChunkSource`."""
