"""A file on this host whose bytes are checked as they are read: a `ChunkSource` around another one.

A chunk of a run is checked by another thread while the next one is read, the last one by the thread that
read it: xxh3 releases the GIL. Were all checked between the reads of one thread, the readers of a disk would
read and check in step, and it would stand still meanwhile. Nothing returns from here whose digest is wrong,
so no ready counter passes it.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future, wait
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from services.store.integrity.digests import Damage, FileDigests, PartCheck, damaged
from services.store.integrity.verified_parts import VerifiedParts, copy_key
from services.store.reading.chunk_source import ChunkSource, fill_run
from services.store.settings import VerifyDisk
from stoker.checkpoint.reading import FileSignature, ReadPart

Checked = tuple[list[int], list[Damage]]
"""The parts found sound, and what is wrong with the others."""


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
        checkers: Executor,
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
            checkers: Threads that check; a reader gives them one chunk at a time of its run, but the last.
        """
        self._inner = inner
        self._path = path
        self._digests = digests
        self._signature = signature
        self._policy = policy
        self._parts = parts
        self._report = report
        self._checkers = checkers
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

        What is to be checked is read chunk by chunk, each beside the check of the one before.

        Args:
            chunks: In order, all of one size.
            offset: Of the first in the file.
            length: Bytes of all of them.
        """
        if self._known_sound(offset, length):
            return fill_run(self._inner, chunks, offset=offset, length=length)
        read: list[ReadPart] = []
        checks: list[Future[Checked]] = []
        try:
            for number, chunk in enumerate(chunks):
                at = number * len(chunk)
                count = min(len(chunk), length - at)
                read += self._inner.read(chunk, offset=offset + at, length=count)
                check = partial(self._check.arrived, chunk, offset=offset + at, length=count)
                checks.append(_done(check()) if at + count == length else self._checkers.submit(check))
        finally:
            wait(checks)  # they look at chunks that are somebody else's soon if a read has failed
        self._judge(checks, chunks, offset=offset, length=length)
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

    def _judge(
        self, checks: Sequence[Future[Checked]], chunks: Sequence[memoryview], *, offset: int, length: int
    ) -> None:
        """Remember what was found sound; raise ChunkDamaged for what was not."""
        sound = [part for check in checks for part in check.result()[0]]
        damages = [damage for check in checks for damage in check.result()[1]]
        if damages:
            self._refuse(damages, chunks, offset=offset, length=length)
        if sound and (key := self._copy_key()) is not None:
            self._parts.found_sound(key, sound, parts=len(self._digests.texts))

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


def _done(checked: Checked) -> Future[Checked]:
    """Return what was checked in this thread as the others are."""
    found: Future[Checked] = Future()
    found.set_result(checked)
    return found
