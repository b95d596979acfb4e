"""A file on this host whose bytes are checked as they are read: a `ChunkSource` around another one.

The check runs in the reader thread right after the read, while other threads read: xxh3 releases the GIL.
Nothing returns from here whose digest is wrong, so no ready counter passes it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.store.integrity.digests import Damage, FileDigests, PartCheck, damaged
from services.store.integrity.verified_parts import VerifiedParts, copy_key
from services.store.reading.chunk_source import ChunkSource, fill_run
from services.store.settings import VerifyDisk
from stoker.checkpoint.reading import FileSignature, ReadPart


@dataclass(frozen=True, slots=True, kw_only=True)
class DamagedCopy:
    """A copy on disk that is not what was written.

    Attributes:
        path: Of the file.
        damages: Its parts that are wrong.
        pieces: The bytes that were found, of the read that found it; valid during the call only.
        offset: Where those lie in the file.
    """

    path: Path
    damages: tuple[Damage, ...]
    pieces: tuple[memoryview, ...]
    offset: int


class VerifiedSource:
    """Checks what `inner` reads."""

    def __init__(  # noqa: PLR0913 - what is checked, and whom it is told
        self,
        inner: ChunkSource,
        path: Path,
        digests: FileDigests,
        *,
        signature: FileSignature,
        policy: VerifyDisk,
        parts: VerifiedParts,
        report: Callable[[DamagedCopy], str],
    ) -> None:
        """Wrap a source.

        Args:
            inner: Reads the file.
            path: The file, links resolved.
            digests: What its bytes must have.
            signature: Of the file that `inner` reads; it refuses any other.
            policy: `always` or `first`.
            parts: What was found sound before.
            report: Told of damage, from a reader thread; returns what the error shall advise.
        """
        self._inner = inner
        self._path = path
        self._digests = digests
        self._signature = signature
        self._policy = policy
        self._parts = parts
        self._report = report
        self._lock = threading.Lock()
        self._key: str | None = None
        self._key_known = False
        self._check = PartCheck(digests, wanted=self._wanted)

    @property
    def name(self) -> str:
        """See `ChunkSource`."""
        return self._inner.name

    def read(self, chunk: memoryview, *, offset: int, length: int) -> list[ReadPart]:
        """See `ChunkSource`; a part that spans several chunks is checked by the read that completes it.

        Raises:
            ChunkDamaged: The bytes are not those that were written.
            LoadFailed: The file cannot be read.
        """
        return self.read_run([chunk], offset=offset, length=length)

    def read_run(self, chunks: Sequence[memoryview], *, offset: int, length: int) -> list[ReadPart]:
        """Fill neighbouring chunks; as `read`.

        What is to be checked is read chunk by chunk: no read hides the last check of a load, so it is short.

        Args:
            chunks: In order, all of one size.
            offset: Of the first in the file.
            length: Bytes of all of them.
        """
        if self._known_sound(offset, length):
            return fill_run(self._inner, chunks, offset=offset, length=length)
        read: list[ReadPart] = []
        for number, chunk in enumerate(chunks):
            at = number * len(chunk)
            count = min(len(chunk), length - at)
            read += self._inner.read(chunk, offset=offset + at, length=count)
            sound, damages = self._check.arrived(chunk, offset=offset + at, length=count)
            if damages:
                self._refuse(damages, chunks[: number + 1], offset=offset, length=at + count)
            if sound and (key := self._copy_key()) is not None:
                self._parts.found_sound(key, sound, parts=len(self._digests.texts))
        return read

    def close(self) -> None:
        """See `ChunkSource`."""
        self._inner.close()

    def _known_sound(self, offset: int, length: int) -> bool:
        """Tell whether no part that these bytes touch is to be checked; one look for all of them."""
        if self._policy is VerifyDisk.ALWAYS or (key := self._copy_key()) is None:
            return False
        touched = self._digests.touched(offset, offset + length)
        return self._parts.are_sound(key, touched, parts=len(self._digests.texts))

    def _wanted(self, part: int) -> bool:
        if self._policy is VerifyDisk.ALWAYS:
            return True
        key = self._copy_key()
        return key is None or not self._parts.is_sound(key, part, parts=len(self._digests.texts))

    def _copy_key(self) -> str | None:
        """Return which copy is being read; None when another file took its place: nothing is remembered."""
        with self._lock:
            if not self._key_known:
                with suppress(OSError):
                    status = self._path.stat()
                    if FileSignature.of(status) == self._signature:
                        self._key = copy_key(status, self._digests)
                self._key_known = True
            return self._key

    def _refuse(
        self, damages: Sequence[Damage], chunks: Sequence[memoryview], *, offset: int, length: int
    ) -> None:
        key = self._copy_key()
        if key is not None:
            self._parts.found_damaged(key)
        size = len(chunks[0])
        pieces = tuple(chunk[: length - number * size] for number, chunk in enumerate(chunks))
        advice = self._report(
            DamagedCopy(path=self._path, damages=tuple(damages), pieces=pieces, offset=offset)
        )
        raise damaged(os.fspath(self._path), damages, advice=advice)
