"""What a digest covers and what memory holds need not agree: every part is checked all the same."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.integrity.digests import FileDigests, PartCheck, check_chunk, damaged
from stoker.checkpoint.digests import digest


def content_of(size: int) -> bytearray:
    return bytearray((at * 31 + at // 251) % 256 for at in range(size))


def digests_of(content: bytes, part_bytes: int) -> FileDigests:
    return FileDigests(
        size_bytes=len(content),
        part_bytes=part_bytes,
        texts=tuple(digest(content[at : at + part_bytes]) for at in range(0, len(content), part_bytes)),
    )


def chunks_of(content: bytes, chunk_bytes: int) -> list[tuple[int, memoryview, int]]:
    """Offset, memory as long as a chunk, and how much of it counts."""
    found = []
    for at in range(0, len(content), chunk_bytes):
        piece = content[at : at + chunk_bytes]
        found.append((at, memoryview(bytes(piece).ljust(chunk_bytes, b"?")), len(piece)))
    return found


def test_parts_inside_one_chunk_are_checked_each():
    content = content_of(1000)
    digests = digests_of(content, 100)
    content[250] ^= 1
    content[999] ^= 1

    found = check_chunk(memoryview(content), digests, offset=0, length=1000)

    assert [(damage.part, damage.begin, damage.end) for damage in found] == [(2, 200, 300), (9, 900, 1000)]


def test_bytes_behind_the_wanted_ones_do_not_count():
    content = content_of(150)
    digests = digests_of(content, 100)

    found = check_chunk(memoryview(bytes(content) + b"over-read"), digests, offset=0, length=150)

    assert found == ()


def test_a_part_that_is_not_whole_is_left_alone():
    content = content_of(300)
    digests = digests_of(content, 100)
    content[120] ^= 1

    found = check_chunk(memoryview(content)[50:180], digests, offset=50, length=130)

    assert found == ()


@given(
    size=st.integers(1, 700),
    part_bytes=st.integers(1, 300),
    chunk_bytes=st.integers(1, 300),
    data=st.data(),
)
def test_a_flipped_bit_is_found_in_its_part_and_nowhere_else(size, part_bytes, chunk_bytes, data):
    content = content_of(size)
    digests = digests_of(content, part_bytes)
    flipped = data.draw(st.none() | st.integers(0, size - 1))
    if flipped is not None:
        content[flipped] ^= 1 << data.draw(st.integers(0, 7))
    check = PartCheck(digests)

    sound, damages = [], []
    for offset, memory, length in data.draw(st.permutations(chunks_of(content, chunk_bytes))):
        passed, failed = check.arrived(memory, offset=offset, length=length)
        sound += passed
        damages += failed

    bad = [] if flipped is None else [flipped // part_bytes]
    assert [damage.part for damage in damages] == bad
    assert sorted(sound + bad) == list(range(len(digests.texts)))


def test_the_last_piece_of_a_part_settles_it_whoever_brings_it():
    content = content_of(100)
    check = PartCheck(digests_of(content, 100))

    after = [
        check.arrived(memoryview(content)[at : at + 40], offset=at, length=min(40, 100 - at))
        for at in (80, 0, 40)
    ]

    assert after == [([], []), ([], []), ([0], [])]


def test_parts_that_nobody_wants_checked_pass():
    content = content_of(300)
    digests = digests_of(content, 100)
    content[50] ^= 1
    check = PartCheck(digests, wanted=lambda part: part != 0)

    assert check.arrived(memoryview(content), offset=0, length=300) == ([1, 2], [])


def test_one_digest_per_part_is_demanded():
    with pytest.raises(ValueError, match="1 digests for 200 bytes"):
        FileDigests(size_bytes=200, part_bytes=100, texts=("x",))


def test_the_error_says_where_and_what_to_do():
    content = content_of(300)
    digests = digests_of(content, 100)
    content[150] ^= 1
    content[299] ^= 1
    damages = check_chunk(memoryview(content), digests, offset=0, length=300)

    error = damaged("/m/model.safetensors", damages, advice="convert it again")

    assert "/m/model.safetensors is damaged between bytes 100 and 200 (and 1 more)" in error.message
    assert error.message.endswith("convert it again")
