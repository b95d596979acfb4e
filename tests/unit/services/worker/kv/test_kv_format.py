"""The wire form of a piece is protobuf's own."""

from __future__ import annotations

import pytest

from services.worker.kv.kv_format import encoded, sealed
from stoker.v1.session_kv_pb2 import KvPart


@pytest.mark.parametrize("size", [1, 127, 128, 16_383, 16_384, 2_100_000])
@pytest.mark.parametrize("first", [0, 1, 300])
def test_an_encoded_piece_is_read_as_the_sealed_one(size: int, first: int) -> None:
    tokens, data = list(range(first, first + 200)), (bytes(range(251)) * (size // 251 + 1))[:size]

    raw = encoded(first, tokens, memoryview(data))

    assert KvPart.FromString(raw) == KvPart(piece=sealed(first, tokens, data))
