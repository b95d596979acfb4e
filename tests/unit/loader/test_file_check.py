"""Which part of a file is damaged is told by the digest that covers it."""

from __future__ import annotations

from pathlib import Path

import pytest

from stoker.checkpoint.digests import digest
from stoker.checkpoint.index import CheckpointFile
from stoker.errors import CheckpointInvalid
from stoker.loader.file_check import FileCheck, Verify

DATA = bytes(range(25))
FILE = CheckpointFile(
    name="w",
    path=Path("/folder/w"),
    size_bytes=25,
    data_start=0,
    chunk_digests=tuple(digest(DATA[start : start + 10]) for start in (0, 10, 20)),
)
CHECK = FileCheck(verify=Verify.FIRST, chunk_bytes=10)


def test_whole_files_and_parts_with_the_right_bytes_pass() -> None:
    for begin, end in ((0, 25), (10, 20), (20, 25)):
        CHECK.check(FILE, memoryview(DATA), begin, end)


@pytest.mark.parametrize(("at", "named"), [(0, "0 and 10"), (19, "10 and 20"), (24, "20 and 25")])
def test_the_chunk_with_a_wrong_byte_is_named(at: int, named: str) -> None:
    data = bytearray(DATA)
    data[at] ^= 1

    with pytest.raises(CheckpointInvalid, match=f"/folder/w is damaged between bytes {named}"):
        CHECK.check(FILE, memoryview(data), 0, 25)


def test_a_file_without_digests_cannot_be_checked() -> None:
    bare = CheckpointFile(name="w", path=Path("/w"), size_bytes=25, data_start=0, chunk_digests=())
    always = FileCheck(verify=Verify.ALWAYS, chunk_bytes=10)

    assert not always.is_wanted(bare, cached=False)
    assert always.is_wanted(FILE, cached=True)
    assert [CHECK.is_wanted(FILE, cached=each) for each in (True, False)] == [False, True]
