"""The tensor table of an attach, by columns and by messages."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stoker.attach.columns import Tensor, columns_of, message_of, tensors_of
from stoker.errors import PeerError
from stoker.v1 import checkpoint_store_pb2 as pb

TENSORS = st.lists(
    st.builds(
        Tensor,
        name=st.text(max_size=8),
        dtype=st.sampled_from(["BF16", "F32", "U8"]),
        shape=st.lists(st.integers(0, 2**40), max_size=4).map(tuple),
        file=st.integers(0, 3),
        offset=st.integers(0, 2**50),
        nbytes=st.integers(0, 2**50),
        layer=st.none() | st.integers(0, 100),
    ),
    max_size=6,
    unique_by=lambda tensor: tensor.name,
)


@given(TENSORS)
def test_a_table_comes_through_columns_as_it_was(tensors):
    sent = pb.Attached(columns=columns_of(tensors)).SerializeToString()

    found = tensors_of(pb.Attached.FromString(sent))

    assert list(found.items()) == [(tensor.name, tensor) for tensor in tensors]


@given(TENSORS)
def test_a_client_reads_the_messages_of_a_store_that_knows_no_columns(tensors):
    sent = pb.Attached(tensors=map(message_of, tensors)).SerializeToString()

    found = tensors_of(pb.Attached.FromString(sent))

    assert list(found.items()) == [(tensor.name, tensor) for tensor in tensors]


@pytest.mark.parametrize("column", ["names", "dtypes", "dimensions", "extents", "files", "layers"])
def test_columns_of_several_lengths_are_refused(column):
    columns = columns_of([Tensor("a", "F32", (2, 3), 0, 0, 24, None), Tensor("b", "F32", (1,), 0, 24, 4, 1)])
    getattr(columns, column).pop()

    with pytest.raises(PeerError, match="several lengths"):
        tensors_of(pb.Attached(columns=columns))
