"""Claims about writing front to back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.checkpoint.digests import digest, is_digest
from stoker.checkpoint.file_writer import ChunkDigests, write_weights
from stoker.checkpoint.plan import PlannedTensor, plan_file
from stoker.errors import CheckpointInvalid

PLAN = plan_file([PlannedTensor(name="a", dtype="U8", shape=(10,), nbytes=10)])


@given(parts=st.lists(st.binary(max_size=40), max_size=12), chunk_bytes=st.integers(1, 50))
def test_chunk_digests_do_not_depend_on_how_the_stream_is_cut(parts: list[bytes], chunk_bytes: int) -> None:
    chunks = ChunkDigests(chunk_bytes)
    for part in parts:
        chunks.update(memoryview(part))

    whole = b"".join(parts)
    assert chunks.finish() == tuple(
        digest(whole[begin : begin + chunk_bytes]) for begin in range(0, len(whole), chunk_bytes)
    )


def test_a_digest_names_its_algorithm() -> None:
    assert digest(b"").startswith("xxh3-128:")
    assert is_digest(digest(b"x"))
    assert not is_digest("sha256:" + "0" * 32)


@pytest.mark.parametrize("count", [9, 11, 0])
def test_a_source_that_gives_other_than_planned_is_refused(tmp_path: Path, count: int) -> None:
    def read(_name: str) -> Iterator[tuple[None, memoryview]]:
        yield None, memoryview(bytes(count))

    with pytest.raises(CheckpointInvalid, match="changed while it was read"):
        write_weights([tmp_path / "f"], PLAN, read, chunk_bytes=4096, progress=lambda _done, _total: None)


def test_an_existing_file_is_not_written_over(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("mine")

    with pytest.raises(FileExistsError):
        write_weights(
            [tmp_path / "f"], PLAN, lambda _name: (), chunk_bytes=4096, progress=lambda _d, _t: None
        )
    assert (tmp_path / "f").read_text() == "mine"
