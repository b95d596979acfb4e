"""Are the bytes that arrived those that were written? Digests of a file against memory, chunk by chunk.

A digest covers a *part*: `part_bytes` of the file, counted from its first byte, as `stoker.json` says. Memory
comes in chunks of the arena. The two sizes need not agree: one chunk may hold several parts, and one part may
span several chunks. A part is checked as soon as its last byte is there, by whoever brought that byte:

- `check_chunk` checks the parts that lie wholly inside the bytes at hand. Enough where sources are asked for
  whole parts, as arrivals from outside the host are.
- `PartCheck` does that and also remembers the pieces of parts that span several chunks, until they are whole.

xxh3-128 runs at 20 GB/s on one core and releases the GIL, so reader threads check while others read.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from stoker.checkpoint.digests import Digest, digest
from stoker.checkpoint.layout import chunk_count
from stoker.errors import LoadFailed


class ChunkDamaged(LoadFailed):
    """The bytes are there and are not those that were written: another source may have better ones."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FileDigests:
    """What is known of a file's bytes.

    Attributes:
        size_bytes: Of the file.
        part_bytes: What one digest covers; the last part may be shorter.
        texts: One digest per part.
    """

    size_bytes: int
    part_bytes: int
    texts: tuple[str, ...]

    def __post_init__(self) -> None:
        """Check that there is one digest per part."""
        if len(self.texts) != chunk_count(self.size_bytes, self.part_bytes):
            raise ValueError(f"{len(self.texts)} digests for {self.size_bytes} bytes in {self.part_bytes}")

    def begin(self, part: int) -> int:
        """Return the first byte of a part."""
        return part * self.part_bytes

    def end(self, part: int) -> int:
        """Return one past the last byte of a part."""
        return min(self.begin(part) + self.part_bytes, self.size_bytes)

    def touched(self, begin: int, end: int) -> range:
        """Return the parts that have bytes in `begin` … `end`."""
        return range(begin // self.part_bytes, chunk_count(min(end, self.size_bytes), self.part_bytes))

    def inside(self, begin: int, end: int) -> range:
        """Return the parts that lie wholly inside `begin` … `end`."""
        last = len(self.texts) if end >= self.size_bytes else end // self.part_bytes
        return range(chunk_count(begin, self.part_bytes), last)


@dataclass(frozen=True, slots=True, kw_only=True)
class Damage:
    """A part whose bytes are not those that were written.

    Attributes:
        part: Its number in the file.
        begin: Its first byte in the file.
        end: One past its last.
        expected: The digest that it should have.
        found: The digest that it has.
    """

    part: int
    begin: int
    end: int
    expected: str
    found: str


def check_chunk(memory: memoryview, digests: FileDigests, *, offset: int, length: int) -> tuple[Damage, ...]:
    """Return what is wrong with the parts that lie wholly inside the bytes at hand; pure, releases the GIL.

    Args:
        memory: The bytes; may be longer than `length`.
        digests: Of the whole file.
        offset: Where the bytes lie in the file.
        length: How many there are.
    """
    found = (
        _compare(digests, part, [memory[digests.begin(part) - offset : digests.end(part) - offset]])
        for part in digests.inside(offset, offset + length)
    )
    return tuple(damage for damage in found if damage is not None)


def damaged(name: str, damages: Sequence[Damage], *, advice: str) -> ChunkDamaged:
    """Return the error that says what is wrong with the source `name` and what to do about it."""
    first = damages[0]
    more = f" (and {len(damages) - 1} more)" if len(damages) > 1 else ""
    return ChunkDamaged(
        f"{name} is damaged between bytes {first.begin:,} and {first.end:,}{more}: the digest there is "
        f"{first.found}, it was written as {first.expected}; {advice}"
    )


class PartCheck:
    """Checks the parts of one file of one load, whatever chunks their bytes come in; any thread."""

    def __init__(self, digests: FileDigests, *, wanted: Callable[[int], bool] = lambda _part: True) -> None:
        """Take what to check against.

        Args:
            digests: Of the file.
            wanted: Whether a part is to be checked; the others pass.
        """
        self.digests = digests
        self._wanted = wanted
        self._lock = threading.Lock()
        self._pieces: dict[int, dict[int, memoryview]] = {}

    def arrived(self, memory: memoryview, *, offset: int, length: int) -> tuple[list[int], list[Damage]]:
        """Check every part that these bytes complete; returns the sound ones and the damaged ones.

        Args:
            memory: The bytes, which stay where they are until the load has ended.
            offset: Where they lie in the file.
            length: How many there are.
        """
        sound: list[int] = []
        damages: list[Damage] = []
        for part, pieces in self._completed(memory, offset, length):
            damage = _compare(self.digests, part, pieces)
            if damage is None:
                sound.append(part)
            else:
                damages.append(damage)
        return sound, damages

    def _completed(self, memory: memoryview, offset: int, length: int) -> list[tuple[int, list[memoryview]]]:
        """Note the bytes as pieces of their parts; return the wanted parts that are whole now."""
        whole = []
        for part in self.digests.touched(offset, offset + length):
            if not self._wanted(part):
                continue
            begin, end = self.digests.begin(part), self.digests.end(part)
            low, high = max(begin, offset), min(end, offset + length)
            piece = memory[low - offset : high - offset]
            with self._lock:
                pieces = self._pieces.setdefault(part, {})
                pieces[low] = piece
                if sum(map(len, pieces.values())) < end - begin:
                    continue
                del self._pieces[part]
            whole.append((part, [pieces[at] for at in sorted(pieces)]))
        return whole


def _compare(digests: FileDigests, part: int, pieces: Sequence[memoryview]) -> Damage | None:
    expected = digests.texts[part]
    if len(pieces) == 1:
        found = digest(pieces[0])
    else:
        state = Digest()
        for piece in pieces:
            state.update(piece)
        found = state.text()
    if found == expected:
        return None
    return Damage(part=part, begin=digests.begin(part), end=digests.end(part), expected=expected, found=found)
