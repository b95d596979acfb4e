from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.checkpoint.cuts import Cut, deal


@settings(deadline=None, max_examples=60)
@given(
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    data=st.data(),
    ranks=st.integers(1, 4),
    blocks=st.integers(1, 3),
    slice_bytes=st.integers(1, 300),
    unit_scale=st.sampled_from([1, 16_500]),
)
def test_dealing_gives_each_rank_the_pieces_that_slicing_gives(  # noqa: PLR0913, PLR0917 - one draw each
    shape, data, ranks, blocks, slice_bytes, unit_scale
) -> None:
    dim = data.draw(st.integers(0, len(shape) - 1))
    shape[dim] *= ranks * blocks
    if unit_scale > 1:
        shape, slice_bytes = [*shape, unit_scale], 70_000
    whole = torch.randint(-(2**31), 2**31, shape, dtype=torch.int32)
    cut = Cut(dim=dim, blocks=blocks)
    raw = memoryview(whole.numpy()).cast("B")
    parts = (raw[at : at + slice_bytes] for at in range(0, len(raw), slice_bytes))

    got = [b""] * ranks
    unit_bytes = cut.unit_bytes(tuple(shape), "I32", ranks)
    for rank, piece in deal(parts, unit_bytes=unit_bytes, ranks=ranks):
        got[rank] += bytes(piece)

    for rank in range(ranks):
        pieces = [block.chunk(ranks, dim)[rank] for block in whole.chunk(blocks, dim)]
        wanted = torch.cat(pieces, dim)
        assert tuple(wanted.shape) == cut.piece_shape(tuple(shape), ranks)
        assert cut.whole_shape(tuple(wanted.shape), ranks) == tuple(shape)
        assert got[rank] == wanted.contiguous().numpy().tobytes()


@pytest.mark.parametrize(("shape", "divides"), [((6, 4), True), ((5, 4), False), ((), False)])
def test_a_cut_says_whether_it_divides(shape, divides) -> None:
    assert Cut(dim=0).divides(shape, 2) is divides


def test_a_piece_that_would_end_inside_a_byte_has_no_length() -> None:
    assert Cut(dim=0).unit_bytes((2, 3), "F4", 2) is None
    assert Cut(dim=0).unit_bytes((2, 4), "F4", 2) == 2
