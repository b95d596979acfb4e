"""Which parts of which copies on disk were found sound: so that `first` checks each only once.

A copy is known by its file's device, inode, size, modification and change time and by the digests it should
have: whatever is written to the file makes another copy of it, also where somebody set the modification time
back. Reboots and the disk itself are not noticed: that is what `always` is for.

What is remembered: in memory the parts of the last `MAX_COPIES` copies; on disk, in the run folder, one empty
file per copy that was found sound to its last part, with the copy's key for its name. Its being there is the
whole record, so nothing half-written can be believed. The run folder usually lies on a tmpfs or is emptied by
a reboot; then every copy is checked again, once. A record that cannot be written costs a check, no load.
"""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from services.store.integrity.digests import FileDigests
from stoker import log
from stoker.checkpoint.digests import digest_of_texts

MAX_COPIES = 4096
"""Copies remembered, in memory and on disk each."""

FOLDER_NAME = "verified"


def copy_key(status: os.stat_result, digests: FileDigests) -> str:
    """Return 32 hex digits that change when the file or what is expected of it does; pure."""
    file = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
    return digest_of_texts([*map(str, file), str(digests.part_bytes), *digests.texts])


@dataclass(slots=True)
class _Copy:
    """What is known of one copy: a flag per part, and how many are unset."""

    sound: bytearray
    left: int


class VerifiedParts:
    """The memory of a daemon; used from any thread."""

    def __init__(self, folder: Path | None, *, max_copies: int = MAX_COPIES) -> None:
        """Args: folder: for the records, made where missing; None = nothing outlives this object."""
        self._folder = folder
        self._max_copies = max_copies
        self._lock = threading.Lock()
        self._copies: OrderedDict[str, _Copy] = OrderedDict()

    def is_sound(self, key: str, part: int, *, parts: int) -> bool:
        """Tell whether a part of a copy was found sound.

        Args:
            key: Of the copy.
            part: Its number.
            parts: How many the copy has.
        """
        return self.are_sound(key, range(part, part + 1), parts=parts)

    def are_sound(self, key: str, numbers: range, *, parts: int) -> bool:
        """Tell whether all of these neighbouring parts were found sound; as `is_sound`."""
        with self._lock:
            return all(self._copy(key, parts).sound[numbers.start : numbers.stop])

    def found_sound(self, key: str, numbers: list[int], *, parts: int) -> None:
        """Remember that these parts of a copy, which has so many, are sound; blocks for a moment."""
        with self._lock:
            copy = self._copy(key, parts)
            before = copy.left
            for part in numbers:
                copy.left -= not copy.sound[part]
                copy.sound[part] = 1
            complete = bool(before) and not copy.left
        if complete:
            self._write_record(key)

    def found_damaged(self, key: str) -> None:
        """Forget that a copy was sound."""
        with self._lock:
            self._copies.pop(key, None)
        if self._folder is not None:
            with suppress(OSError):
                (self._folder / key).unlink(missing_ok=True)

    def _copy(self, key: str, parts: int) -> _Copy:
        copy = self._copies.get(key)
        if copy is None:
            sound = self._folder is not None and (self._folder / key).exists()
            copy = _Copy(bytearray([sound]) * parts, 0 if sound else parts)
            self._copies[key] = copy
            while len(self._copies) > self._max_copies:
                self._copies.popitem(last=False)
        self._copies.move_to_end(key)
        return copy

    def _write_record(self, key: str) -> None:
        if self._folder is None:
            return
        try:
            self._folder.mkdir(mode=0o700, exist_ok=True)
            with os.scandir(self._folder) as entries:
                known = [(entry.stat().st_mtime_ns, entry.path) for entry in entries]
            for _, path in sorted(known)[: max(0, len(known) + 1 - self._max_copies)]:
                Path(path).unlink(missing_ok=True)
            (self._folder / key).touch(mode=0o600)
        except OSError as error:
            log.get().warning(
                "verified.not_recorded",
                folder=str(self._folder),
                reason=error.strerror,
                action="the copy is checked again after a restart",
            )
