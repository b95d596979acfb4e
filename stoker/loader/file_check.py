"""Digests of weights files, compared as the library brings their bytes in."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from stoker.checkpoint.digests import digest
from stoker.errors import CheckpointInvalid, InvalidRequest

if TYPE_CHECKING:
    from stoker.checkpoint.index import CheckpointFile


class Verify(StrEnum):
    """When the digests of a converted checkpoint are compared with its bytes."""

    ALWAYS = "always"
    FIRST = "first"
    """When they come from the disk, not where the page cache has them already."""
    NEVER = "never"


def verify_named(text: str) -> Verify:
    """Return what a caller asks for.

    Raises:
        InvalidRequest: It is none of them.
    """
    try:
        return Verify(text)
    except ValueError:
        known = ", ".join(repr(each.value) for each in Verify)
        raise InvalidRequest(f"verify={text!r}: choose one of {known}", param="verify") from None


@dataclass(frozen=True, slots=True, kw_only=True)
class FileCheck:
    """How files of one checkpoint are checked.

    Attributes:
        verify: When.
        chunk_bytes: What one digest covers.
    """

    verify: Verify = Verify.NEVER
    chunk_bytes: int = 1

    def is_wanted(self, file: CheckpointFile, *, cached: bool) -> bool:
        """Tell whether a file is checked: one without digests can't be.

        Args:
            file: Which.
            cached: The page cache has it.
        """
        if not file.chunk_digests or self.verify is Verify.NEVER:
            return False
        return self.verify is Verify.ALWAYS or not cached

    def check(self, file: CheckpointFile, data: memoryview, begin: int, end: int) -> None:
        """Compare part of a file with its digests.

        Args:
            file: Which.
            data: All of its bytes; those of the part are there.
            begin: First byte of the part, where a chunk begins.
            end: One past its last byte, where a chunk or the file ends.

        Raises:
            CheckpointInvalid: Bytes are other than those that were converted.
        """
        for start in range(begin, end, self.chunk_bytes):
            stop = min(start + self.chunk_bytes, end)
            if digest(data[start:stop]) != file.chunk_digests[start // self.chunk_bytes]:
                raise CheckpointInvalid(
                    f"{file.path} is damaged between bytes {start:,} and {stop:,}: they are not what was "
                    "converted; convert the original again, or copy the file again from where it is whole"
                )
