"""A run of chunks from the nearest source that gives the right bytes."""

from __future__ import annotations

import os

import pytest

from services.store.chain import Chain, FarFile, Link, Tier, order_of_sources, run_chunks
from services.store.integrity.digests import FileDigests
from stoker.checkpoint.digests import digest
from stoker.checkpoint.reading import ReadPart
from stoker.errors import LoadFailed

CONTENT = os.urandom(1000)


class Source:
    """Gives `content`, or fails."""

    def __init__(self, name: str, content: bytes = CONTENT, *, fails: str = "") -> None:
        self.name = name
        self.content = content
        self.fails = fails
        self.asked: list[int] = []
        self.closed = False

    def read(self, chunk: memoryview, *, offset: int, length: int) -> list[ReadPart]:
        """See `ChunkSource`."""
        self.asked.append(offset)
        if self.fails:
            raise LoadFailed(self.fails)
        chunk[:length] = self.content[offset : offset + length]
        return [ReadPart(tier=self.name, byte_count=length, began_seconds=0.0, ended_seconds=1.0)]

    def close(self) -> None:
        """See `ChunkSource`."""
        self.closed = True


def far_file(*, part_bytes: int = 128, digests: bool = True) -> FarFile:
    texts = tuple(digest(CONTENT[at : at + part_bytes]) for at in range(0, len(CONTENT), part_bytes))
    return FarFile(
        uri="s3://bucket/model",
        revision="r",
        name="model.safetensors",
        size_bytes=len(CONTENT),
        digests=FileDigests(size_bytes=len(CONTENT), part_bytes=part_bytes, texts=texts) if digests else None,
    )


def chain(*links: Link, file: FarFile | None = None):
    refusals = []
    return Chain(file or far_file(), links, refusals.append), refusals


def chunks(count: int, size: int) -> list[memoryview]:
    return [memoryview(bytearray(size)) for _ in range(count)]


def test_sources_are_asked_nearest_first():
    links = [
        Link(tier=Tier.ORIGIN, source=Source("origin")),
        Link(tier=Tier.PEER, source=Source("peer 1")),
        Link(tier=Tier.CACHE, source=Source("disk")),
        Link(tier=Tier.PEER, source=Source("peer 2")),
    ]

    assert [link.source.name for link in order_of_sources(links)] == ["disk", "peer 1", "peer 2", "origin"]


def test_the_next_source_is_asked_when_one_fails():
    far = Source("origin")
    made, refusals = chain(
        Link(tier=Tier.ORIGIN, source=far), Link(tier=Tier.CACHE, source=Source("disk", fails="not there"))
    )
    (chunk,) = chunks(1, 256)

    assert [part.tier for part in made.read(chunk, offset=256, length=256)] == ["origin"]
    assert bytes(chunk) == CONTENT[256:512]
    assert [(each.source, each.damaged, each.reason) for each in refusals] == [("disk", False, "not there")]


def test_wrong_bytes_are_never_returned():
    lying = Source("peer", CONTENT[:300] + b"\0" + CONTENT[301:])
    made, refusals = chain(
        Link(tier=Tier.PEER, source=lying), Link(tier=Tier.ORIGIN, source=Source("origin"))
    )
    (chunk,) = chunks(1, 256)

    assert [part.tier for part in made.read(chunk, offset=256, length=256)] == ["origin"]
    assert bytes(chunk) == CONTENT[256:512]
    assert refusals[0].damaged
    assert "256 and 384" in refusals[0].reason


def test_the_load_fails_only_when_the_last_source_did_and_names_all():
    made, _ = chain(
        Link(tier=Tier.PEER, source=Source("peer", fails="gone")),
        Link(tier=Tier.ORIGIN, source=Source("origin", fails="404")),
    )

    with pytest.raises(LoadFailed, match=r"peer: gone; origin: 404"):
        made.read(chunks(1, 256)[0], offset=0, length=256)


def test_a_run_covers_whole_digests_whatever_the_sizes():
    small, large, odd = (far_file(part_bytes=size) for size in (64, 512, 96))

    assert run_chunks(small, 128) == 1
    assert run_chunks(large, 128) == 4
    assert run_chunks(odd, 128) == 3
    assert run_chunks(far_file(part_bytes=7), 128) == 7
    assert run_chunks(far_file(part_bytes=999), 128) == 8  # the whole file
    assert run_chunks(far_file(digests=False), 128) == 1


def test_a_digest_over_several_chunks_is_checked_over_the_run():
    lying = Source("peer", CONTENT[:200] + b"\0" + CONTENT[201:])
    file = far_file(part_bytes=512)
    made, refusals = chain(
        Link(tier=Tier.PEER, source=lying), Link(tier=Tier.ORIGIN, source=Source("origin")), file=file
    )
    run = chunks(4, 128)
    made.read_run(run, offset=0, length=512)
    tail = chunks(4, 128)
    made.read_run(tail, offset=512, length=488)

    assert b"".join(run) == CONTENT[:512]
    assert b"".join(tail)[:488] == CONTENT[512:]
    assert [each.offset for each in refusals] == [0]


def test_without_digests_the_first_source_that_answers_is_believed():
    made, refusals = chain(
        Link(tier=Tier.ORIGIN, source=Source("origin", bytes(1000))), file=far_file(digests=False)
    )
    (chunk,) = chunks(1, 100)
    made.read(chunk, offset=900, length=100)

    assert not refusals
    assert bytes(chunk) == bytes(100)


def test_closing_closes_every_source():
    sources = [Source("a"), Source("b")]
    made, _ = chain(*(Link(tier=Tier.PEER, source=source) for source in sources))
    made.close()

    assert all(source.closed for source in sources)
