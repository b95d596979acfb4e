"""Keys and values between workers: what must be equal, and how they are cut into pieces. Pure, without torch.

A piece holds consecutive tokens, layer by layer, keys before values: [layers, 2, tokens, kv heads, head dim],
numbers in the engine's dtype, little endian. Whatever an engine's own store looks like, this is what leaves
and enters it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields

import xxhash
from google.protobuf.message import Message

from stoker.errors import KvDamaged, KvUnavailable
from stoker.units import MIB, format_bytes
from stoker.v1 import session_kv_pb2

PIECE_BYTES = MIB
"""A piece holds as many tokens as fit, at least one."""
MAX_TOKEN_BYTES = 3 * MIB
"""Larger ones don't fit a message of the wire (`stoker.rpc.MAX_MESSAGE_BYTES`). A model of 70 billion weights
with grouped queries, in bfloat16, has 0.3 MiB."""
ALL_TOKENS = "all-tokens/rotated-keys"
"""The one kind of cache there is here: every token of every layer, the rotary embedding applied."""
SOME_HEADS = "some-heads"
"""A tensor-parallel rank's part of that: never leaves it."""
DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class KvLayout:
    """How one engine's keys and values lie in pieces: equal layouts can be exchanged."""

    revision: str
    """Of the model's checkpoint."""
    engine: str
    cache: str
    """`ALL_TOKENS` or `SOME_HEADS`."""
    dtype: str
    layers: int
    kv_heads: int
    head_dim: int

    @property
    def token_bytes(self) -> int:
        """Return the bytes of one token in all layers."""
        return 2 * self.layers * self.kv_heads * self.head_dim * DTYPE_BYTES[self.dtype]

    @property
    def piece_tokens(self) -> int:
        """Return how many tokens a piece holds."""
        return max(1, PIECE_BYTES // self.token_bytes)

    def shape(self, tokens: int) -> tuple[int, int, int, int, int]:
        """Return the shape of a piece of so many tokens."""
        return self.layers, 2, tokens, self.kv_heads, self.head_dim

    def pieces(self, first: int, end: int) -> Iterator[tuple[int, int]]:
        """Yield first token and end of each piece of the tokens from `first` to `end`."""
        for start in range(first, end, self.piece_tokens):
            yield start, min(end, start + self.piece_tokens)

    def check_sendable(self) -> None:
        """Refuse what pieces can't carry.

        Raises:
            KvUnavailable: The dtype isn't known, a single token is larger than a message, or one process has
                only a part of each.
        """
        if self.cache == SOME_HEADS:
            raise KvUnavailable("keys and values are dealt out over tensor-parallel ranks")
        if self.dtype not in DTYPE_BYTES:
            known = ", ".join(DTYPE_BYTES)
            raise KvUnavailable(f"keys and values in {self.dtype} are not shipped, only in {known}")
        if self.token_bytes > MAX_TOKEN_BYTES:
            raise KvUnavailable(
                f"keys and values of one token take {format_bytes(self.token_bytes)}, "
                f"a piece {format_bytes(MAX_TOKEN_BYTES)} at most"
            )

    def check_equal(self, theirs: KvLayout) -> None:
        """Refuse keys and values that lie differently.

        Raises:
            KvUnavailable: Something differs; the message names it.
        """
        for field in fields(self):
            ours, other = getattr(self, field.name), getattr(theirs, field.name)
            if ours != other:
                raise KvUnavailable(
                    f"keys and values can't be exchanged: {field.name} is {other!r} there, {ours!r} here"
                )

    def to_proto(self) -> session_kv_pb2.KvLayout:
        """Return the message."""
        return session_kv_pb2.KvLayout(**{field.name: getattr(self, field.name) for field in fields(self)})

    @classmethod
    def from_proto(cls, message: session_kv_pb2.KvLayout) -> KvLayout:
        """Return the value of a message."""
        return cls(**{field.name: getattr(message, field.name) for field in fields(cls)})


def sealed(first: int, token_ids: Sequence[int], data: bytes | memoryview) -> session_kv_pb2.KvPiece:
    """Return a piece with its digest."""
    return session_kv_pb2.KvPiece(
        first_token=first, token_ids=token_ids, data=bytes(data), digest=xxhash.xxh3_128_digest(data)
    )


def encoded(first: int, token_ids: Sequence[int], data: bytes | memoryview) -> bytes:
    """Return the wire form of a `KvPart` that carries a sealed piece; its bytes are copied once.

    By protobuf's messages they would be copied three times, with the interpreter's lock held.
    """
    rest = session_kv_pb2.KvPiece(
        first_token=first, token_ids=token_ids, digest=xxhash.xxh3_128_digest(data)
    ).SerializeToString()
    data_head = _LENGTH_OF_DATA + _varint(len(data))
    piece_head = _LENGTH_OF_PIECE + _varint(len(rest) + len(data_head) + len(data))
    return b"".join((piece_head, rest, data_head, data))


def _varint(number: int) -> bytes:
    out = bytearray()
    while number > 0x7F:  # noqa: PLR2004 - seven bits a byte
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _head_of(message: type[Message], field: str) -> bytes:
    """Return what precedes the length of a field of bytes, on protobuf's wire."""
    return _varint(message.DESCRIPTOR.fields_by_name[field].number << 3 | 2)


_LENGTH_OF_PIECE = _head_of(session_kv_pb2.KvPart, "piece")
_LENGTH_OF_DATA = _head_of(session_kv_pb2.KvPiece, "data")


def opened(piece: session_kv_pb2.KvPiece, layout: KvLayout, *, at: int, end: int) -> bytes:
    """Return a piece's bytes, checked.

    Args:
        piece: As it came.
        layout: Of the pieces.
        at: The token it must begin with.
        end: The token it must not go past.

    Raises:
        KvDamaged: It is not the piece that must come now, or its bytes are not those that were sent.
    """
    tokens, data = len(piece.token_ids), piece.data  # each look at it is a copy
    if piece.first_token != at or not 0 < tokens <= end - at:
        raise KvDamaged(
            f"keys and values of {tokens} tokens from {piece.first_token} on came, "
            f"{end - at} at most from {at} on were due"
        )
    if len(data) != tokens * layout.token_bytes:
        raise KvDamaged(f"{len(data)} bytes came for {tokens} tokens of {layout.token_bytes} each")
    if xxhash.xxh3_128_digest(data) != piece.digest:
        raise KvDamaged(f"keys and values from token {at} on were damaged on their way")
    return data
