"""How a chunk is filled: from where, to the last byte, and what happens when it can't be."""

from __future__ import annotations

import errno
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.checkpoint.reading import (
    DISK,
    PAGE_CACHE,
    FileSignature,
    SourceFile,
    Ways,
    fill,
    fill_chunks,
)
from stoker.errors import LoadFailed

BLOCK = 4096
CHUNK = 16 * BLOCK


class FakeFile:
    """A file on a disk that obeys direct I/O's rules, some of whose blocks are in the page cache."""

    def __init__(self, size: int, *, cached_blocks: set[int] = frozenset(), most: int = 1 << 30) -> None:
        self.content = bytes((at * 31 + at // 251) % 256 for at in range(size))
        self.cached_blocks = cached_blocks
        self.most = most
        self.direct_reads: list[tuple[int, int]] = []
        self.ways = Ways(
            cached=self.cached, direct=self.direct, buffered=self.buffered, direct_run=self.direct_run
        )

    def cached(self, into: memoryview, at: int) -> int:
        """Only what is cached, as RWF_NOWAIT does."""
        if at >= len(self.content):
            return 0
        end = at
        while end < at + len(into) and end // BLOCK in self.cached_blocks:
            end = (end // BLOCK + 1) * BLOCK
        if end == at:
            raise OSError(errno.EAGAIN, "not there")
        return self._copy(into, at, min(end - at, len(into)))

    def direct(self, into: memoryview, at: int) -> int:
        """Whole blocks, as O_DIRECT demands."""
        assert at % BLOCK == 0
        assert len(into) % BLOCK == 0
        self.direct_reads.append((at, len(into)))
        count = min(len(into), self.most // BLOCK * BLOCK)
        return self._copy(into, at, count)

    def direct_run(self, into: list[memoryview], at: int) -> int:
        """Several buffers in one call; stops where a direct read would."""
        whole = memoryview(bytearray(sum(map(len, into))))
        count = self.direct(whole, at)
        done = 0
        for buffer in into:
            part = whole[done : min(done + len(buffer), count)]
            buffer[: len(part)] = part
            done += len(part)
        return count

    def buffered(self, into: memoryview, at: int) -> int:
        """Anything, at most `most` bytes."""
        return self._copy(into, at, min(len(into), self.most))

    def _copy(self, into: memoryview, at: int, count: int) -> int:
        piece = self.content[at : at + count]
        into[: len(piece)] = piece
        return len(piece)


@given(
    size=st.integers(1, CHUNK),
    cached=st.sets(st.integers(0, 15)),
    most=st.sampled_from([BLOCK, 3 * BLOCK, 1 << 30]),
)
def test_every_byte_arrives_whatever_is_cached_and_however_short_the_reads(size, cached, most):
    file = FakeFile(size, cached_blocks=cached, most=most)
    chunk = bytearray(CHUNK)

    parts = fill(memoryview(chunk), offset=0, length=size, ways=file.ways)

    assert chunk[:size] == file.content
    assert sum(part.byte_count for part in parts) == size


def test_what_is_in_the_page_cache_comes_from_there_and_the_rest_by_direct_io():
    file = FakeFile(CHUNK, cached_blocks={0, 1, 2})
    ticks = iter([0.0, 1.0, 5.0])

    parts = fill(
        memoryview(bytearray(CHUNK)), offset=0, length=CHUNK, ways=file.ways, now=lambda: next(ticks)
    )

    assert [(part.tier, part.byte_count) for part in parts] == [
        (PAGE_CACHE, 3 * BLOCK),
        (DISK, CHUNK - 3 * BLOCK),
    ]
    assert [(part.began_seconds, part.ended_seconds) for part in parts] == [(0.0, 1.0), (1.0, 5.0)]
    assert file.direct_reads == [(3 * BLOCK, CHUNK - 3 * BLOCK)]


def test_a_filesystem_without_direct_io_is_read_through_the_page_cache():
    file = FakeFile(CHUNK - 5)
    ways = Ways(cached=file.cached, direct=None, buffered=file.buffered)
    chunk = bytearray(CHUNK)

    fill(memoryview(chunk), offset=0, length=CHUNK - 5, ways=ways)

    assert chunk[:-5] == file.content


def test_direct_io_that_is_refused_at_the_read_falls_back():
    file = FakeFile(CHUNK - 5)

    def refuse(into: memoryview, at: int) -> int:
        raise OSError(errno.EINVAL, "unaligned for this device")

    ways = Ways(cached=file.cached, direct=refuse, buffered=file.buffered)
    chunk = bytearray(CHUNK)

    fill(memoryview(chunk), offset=0, length=CHUNK - 5, ways=ways)

    assert chunk[:-5] == file.content


@pytest.mark.parametrize("missing", [1, BLOCK - 1, BLOCK, BLOCK + 1, CHUNK])
@pytest.mark.parametrize("cached", [set(), set(range(16))])
def test_a_file_that_ends_early_says_where(missing: int, cached: set[int]):
    file = FakeFile(CHUNK - missing, cached_blocks=cached)

    with pytest.raises(EOFError) as raised:
        fill(memoryview(bytearray(CHUNK)), offset=0, length=CHUNK, ways=file.ways)

    assert raised.value.args[0] == CHUNK - missing


def test_a_disk_error_is_not_taken_for_a_refusal():
    file = FakeFile(CHUNK)

    def broken(into: memoryview, at: int) -> int:
        raise OSError(errno.EIO, "Input/output error")

    ways = Ways(cached=file.cached, direct=broken, buffered=file.buffered)

    with pytest.raises(OSError, match="Input/output error"):
        fill(memoryview(bytearray(CHUNK)), offset=0, length=CHUNK, ways=ways)


def source(path, **changes) -> SourceFile:
    status = path.stat()
    signature = FileSignature(
        inode=status.st_ino,
        size_bytes=changes.get("size_bytes", status.st_size),
        modified_ns=status.st_mtime_ns,
    )
    return SourceFile(path, signature)


def test_a_real_file_is_read_to_its_odd_end(tmp_path):
    path = tmp_path / "weights"
    content = os.urandom(3 * BLOCK + 17)
    path.write_bytes(content)
    file = source(path)
    chunk = bytearray(CHUNK)

    file.read(memoryview(chunk), offset=0, length=len(content))
    file.close()

    assert chunk[: len(content)] == content


def test_a_file_that_was_cut_fails_the_load(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(2 * BLOCK))
    file = source(path)
    os.truncate(path, BLOCK)

    with pytest.raises(LoadFailed, match="changed or replaced before"):
        file.read(memoryview(bytearray(CHUNK)), offset=0, length=2 * BLOCK)
    file.close()


def test_a_file_that_is_cut_between_two_reads_fails_the_load(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * BLOCK))
    file = source(path)
    file.read(memoryview(bytearray(CHUNK)), offset=0, length=BLOCK)
    os.truncate(path, 2 * BLOCK)

    with pytest.raises(LoadFailed, match=r"ends at byte 8,192 of 16,384"):
        file.read(memoryview(bytearray(CHUNK)), offset=0, length=4 * BLOCK)
    file.close()


def test_a_file_that_is_written_to_between_two_reads_fails_the_load(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(4 * BLOCK))
    file = source(path)
    file.read(memoryview(bytearray(CHUNK)), offset=0, length=BLOCK)
    path.write_bytes(b"x" * 4 * BLOCK)
    os.utime(path, ns=(1, 1))

    with pytest.raises(LoadFailed, match="was changed while"):
        file.read(memoryview(bytearray(CHUNK)), offset=0, length=4 * BLOCK)
    file.close()


def test_a_file_that_is_gone_fails_the_load(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(bytes(BLOCK))
    file = source(path)
    path.unlink()

    with pytest.raises(LoadFailed, match="No such file"):
        file.read(memoryview(bytearray(CHUNK)), offset=0, length=BLOCK)


@given(
    size=st.integers(1, 4 * CHUNK),
    cached=st.sets(st.integers(0, 63)),
    most=st.sampled_from([BLOCK, 5 * BLOCK, CHUNK + BLOCK, 1 << 30]),
)
def test_neighbouring_chunks_are_filled_to_the_last_byte_wherever_their_bytes_are(size, cached, most):
    file = FakeFile(size, cached_blocks=cached, most=most)
    memory = memoryview(bytearray(4 * CHUNK))
    chunks = [memory[at : at + CHUNK] for at in range(0, -(-size // CHUNK) * CHUNK, CHUNK)]

    parts = fill_chunks(chunks, offset=0, length=size, ways=file.ways)

    assert memory[:size] == file.content
    assert sum(part.byte_count for part in parts) == size


def test_what_is_not_cached_of_neighbouring_chunks_is_read_in_one_call():
    cached_third = set(range(32, 48))
    file = FakeFile(4 * CHUNK, cached_blocks=cached_third)
    memory = memoryview(bytearray(4 * CHUNK))
    chunks = [memory[at : at + CHUNK] for at in range(0, 4 * CHUNK, CHUNK)]

    parts = fill_chunks(chunks, offset=0, length=4 * CHUNK, ways=file.ways)

    assert file.direct_reads == [(0, 2 * CHUNK), (3 * CHUNK, CHUNK)]
    assert [(part.tier, part.byte_count) for part in parts] == [
        (DISK, 2 * CHUNK),
        (PAGE_CACHE, CHUNK),
        (DISK, CHUNK),
    ]


def test_a_disk_that_refuses_several_buffers_is_asked_for_each():
    file = FakeFile(2 * CHUNK)

    def refuse(_into, _at):
        raise OSError(errno.EINVAL, "no")

    ways = Ways(cached=file.cached, direct=file.direct, buffered=file.buffered, direct_run=refuse)
    memory = memoryview(bytearray(2 * CHUNK))

    fill_chunks([memory[:CHUNK], memory[CHUNK:]], offset=0, length=2 * CHUNK, ways=ways)

    assert memory == file.content
