"""What stores say to each other: small binary frames, and after a `Chunk` frame the chunk's bytes. Pure.

A frame is `kind: u8, length: u32` (little endian) and a body of that length. A connection begins with `Hello`
from both ends. On a *control* connection the dialler then asks (`Interest`, `Leave`) and the listener tells
(`State`, `Ping`); on a *data* connection the dialler sends `Request` and the listener answers each with
`Chunk` and bytes, or with `Refused`, or, when the chunk is on its way to itself, with `Arriving` and `Part`s
as they come, closed by `Whole` or `Refused`. A file is named by 16 bytes, the digest of its identity, so only
who knows a revision can ask for it.

What comes from a socket is hostile: every length is bounded before anything is allocated, and whatever is not
exactly a message raises `PeerError`.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum
from typing import NewType

from stoker.checkpoint.digests import digest_of_texts
from stoker.checkpoint.layout import chunk_count
from stoker.errors import PeerError
from stoker.units import GIB, KIB

VERSION = 2
MAX_BODY_BYTES = 512 * KIB
"""A `State` of `MAX_CHUNKS` chunks fits."""

MAX_CHUNKS = 2**20
"""Chunks of one file; 16 TiB of 16 MiB chunks."""

MAX_CHUNK_BYTES = GIB
HEAD = struct.Struct("<BI")
_MAGIC = b"STKP"
_HELLO = struct.Struct("<4sHBH")
_INTEREST = struct.Struct("<BQI")
_STATE = struct.Struct("<16sBI")
_REQUEST = struct.Struct("<16sIB")
_CHUNK = struct.Struct("<I16s")
_LENGTH = struct.Struct("<I")
_DIGEST_BYTES = 16
_MAX_TEXT_BYTES = 1024

StoreId = NewType("StoreId", str)
"""Names a running store daemon; new at every start."""

FileId = NewType("FileId", bytes)
"""Names a weights file of a revision, 16 bytes."""


class Purpose(IntEnum):
    """What a connection is for."""

    CONTROL = 1
    DATA = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class FileIdentity:
    """A weights file whose bytes are the same wherever this is the same.

    Attributes:
        revision: Of its checkpoint.
        name: In the checkpoint's folder.
        size_bytes: Whole size.
        chunk_bytes: Of the pool's chunks, in which it is handed on.
    """

    revision: str
    name: str
    size_bytes: int
    chunk_bytes: int

    @property
    def file_id(self) -> FileId:
        """Its name between stores."""
        texts = (self.revision, self.name, str(self.size_bytes), str(self.chunk_bytes))
        return FileId(bytes.fromhex(digest_of_texts(texts)))

    @property
    def chunks(self) -> int:
        """How many chunks it has."""
        return chunk_count(self.size_bytes, self.chunk_bytes)

    def length(self, index: int) -> int:
        """Return how many bytes of the file a chunk holds."""
        return min(self.chunk_bytes, self.size_bytes - index * self.chunk_bytes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """First frame of either end.

    Attributes:
        purpose: Of the connection.
        store: Who speaks.
        port: Where the speaker listens for peers; 0 = nowhere.
    """

    purpose: Purpose
    store: StoreId
    port: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Interest:
    """Tell me what you have of this file, from now on.

    Attributes:
        file: Which.
        loading: The speaker is loading it, and takes its share of the origin's bytes.
    """

    file: FileIdentity
    loading: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Leave:
    """Tell me no more of this file."""

    file_id: FileId


@dataclass(frozen=True, slots=True, kw_only=True)
class State:
    """What the speaker has of a file; the whole of it, each time.

    Attributes:
        file_id: Which.
        loading: The speaker is loading it.
        chunks: How many the file has.
        have: Bit k is set: chunk k can be asked for.
        fetching: Bit k is set: the speaker is fetching the first copy of chunk k.
    """

    file_id: FileId
    loading: bool
    chunks: int
    have: int
    fetching: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """The speaker lives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Send a chunk.

    Attributes:
        file_id: Of which file.
        index: Which one.
        want_digest: The asker has no digest of its own to check the bytes with.
    """

    file_id: FileId
    index: int
    want_digest: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """The chunk's bytes follow.

    Attributes:
        length: How many bytes.
        digest: xxh3-128 of them as 16 bytes; all zero where none was asked for.
    """

    length: int
    digest: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """There is no chunk, for a reason."""

    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Arriving:
    """The chunk is on its way to the speaker; its bytes follow in parts as they come.

    Attributes:
        length: How many bytes in all.
    """

    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """The next bytes of a chunk follow.

    Attributes:
        length: How many; 0 = none for a while, the speaker lives.
    """

    length: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Whole:
    """All parts were sent, and the speaker has found them right.

    Attributes:
        digest: As in `Chunk`.
    """

    digest: bytes


Message = Hello | Interest | Leave | State | Ping | Request | Chunk | Refused | Arriving | Part | Whole
_KINDS: tuple[type[Message], ...] = (
    Hello,
    Interest,
    Leave,
    State,
    Ping,
    Request,
    Chunk,
    Refused,
    Arriving,
    Part,
    Whole,
)


def encode(message: Message) -> bytes:  # noqa: C901 - one case per kind
    """Return the frame of a message."""
    match message:
        case Hello():
            body = _HELLO.pack(_MAGIC, VERSION, message.purpose, message.port) + _text(message.store)
        case Interest(file=file):
            body = _INTEREST.pack(message.loading, file.size_bytes, file.chunk_bytes)
            body += _text(file.revision) + _text(file.name)
        case Leave():
            body = message.file_id
        case State():
            size = -(-message.chunks // 8)
            body = _STATE.pack(message.file_id, message.loading, message.chunks)
            body += message.have.to_bytes(size, "little") + message.fetching.to_bytes(size, "little")
        case Ping():
            body = b""
        case Request():
            body = _REQUEST.pack(message.file_id, message.index, message.want_digest)
        case Chunk():
            body = _CHUNK.pack(message.length, message.digest)
        case Refused():
            body = _text(message.reason)
        case Arriving() | Part():
            body = _LENGTH.pack(message.length)
        case Whole():
            body = message.digest
    return HEAD.pack(_KINDS.index(type(message)), len(body)) + body


def body_length(head: bytes | bytearray) -> int:
    """Return how many bytes follow a frame's head.

    Raises:
        PeerError: More than any message has: whoever speaks is no store.
    """
    kind, length = HEAD.unpack(head)
    if kind >= len(_KINDS) or length > MAX_BODY_BYTES:
        raise PeerError(f"not a message between stores: kind {kind}, {length} bytes; is this port a store's?")
    return int(length)


def decode(head: bytes, body: bytes) -> Message:
    """Return the message of a frame.

    Raises:
        PeerError: It is not exactly one.
    """
    kind = _KINDS[HEAD.unpack(head)[0]]
    try:
        return _decode(kind, body)
    except (struct.error, ValueError) as error:
        raise PeerError(f"a malformed {kind.__name__} from a peer: {error}") from error


def _decode(kind: type[Message], body: bytes) -> Message:  # noqa: C901, PLR0911 - one return per kind
    if kind is Hello:
        return _hello(body)
    if kind is Interest:
        return _interest(body)
    if kind is Leave:
        if len(body) != 16:  # noqa: PLR2004 - of a FileId
            raise ValueError("no file")
        return Leave(file_id=FileId(body))
    if kind is State:
        return _state(body)
    if kind is Ping:
        _end(body, 0)
        return Ping()
    if kind is Request:
        file_id, index, want_digest = _REQUEST.unpack(body)
        return Request(file_id=FileId(file_id), index=index, want_digest=_flag(want_digest))
    if kind is Chunk:
        length, digest = _CHUNK.unpack(body)
        if length > MAX_CHUNK_BYTES:
            raise ValueError(f"a chunk of {length} bytes")
        return Chunk(length=length, digest=digest)
    if kind is Arriving:
        return Arriving(length=_length(body))
    if kind is Part:
        return Part(length=_length(body))
    if kind is Whole:
        _end(body, _DIGEST_BYTES)
        return Whole(digest=body)
    reason, at = _read_text(body, 0)
    _end(body, at)
    return Refused(reason=reason)


def _length(body: bytes) -> int:
    (length,) = _LENGTH.unpack(body)
    if length > MAX_CHUNK_BYTES:
        raise ValueError(f"{length} bytes of a chunk")
    return int(length)


def _hello(body: bytes) -> Hello:
    magic, version, purpose, port = _HELLO.unpack_from(body)
    if magic != _MAGIC:
        raise ValueError("it is no store")
    if version != VERSION:
        raise ValueError(f"it speaks version {version}, this store speaks {VERSION}; run the same release")
    store, at = _read_text(body, _HELLO.size)
    _end(body, at)
    if not store:
        raise ValueError("it has no name")
    return Hello(purpose=Purpose(purpose), store=StoreId(store), port=port)


def _interest(body: bytes) -> Interest:
    loading, size_bytes, chunk_bytes = _INTEREST.unpack_from(body)
    revision, at = _read_text(body, _INTEREST.size)
    name, at = _read_text(body, at)
    _end(body, at)
    if not 0 < chunk_bytes <= MAX_CHUNK_BYTES or not 0 < chunk_count(size_bytes, chunk_bytes) <= MAX_CHUNKS:
        raise ValueError(f"{size_bytes} bytes in chunks of {chunk_bytes}")
    file = FileIdentity(revision=revision, name=name, size_bytes=size_bytes, chunk_bytes=chunk_bytes)
    return Interest(file=file, loading=_flag(loading))


def _state(body: bytes) -> State:
    file_id, loading, chunks = _STATE.unpack_from(body)
    if chunks > MAX_CHUNKS:
        raise ValueError(f"{chunks} chunks")
    size = -(-chunks // 8)
    _end(body, _STATE.size + 2 * size)
    have = int.from_bytes(body[_STATE.size : _STATE.size + size], "little")
    fetching = int.from_bytes(body[_STATE.size + size :], "little")
    if (have | fetching) >> chunks:
        raise ValueError("a chunk past the end of the file")
    return State(file_id=FileId(file_id), loading=_flag(loading), chunks=chunks, have=have, fetching=fetching)


def _flag(value: int) -> bool:
    if value > 1:
        raise ValueError(f"{value} is neither yes nor no")
    return bool(value)


def _text(text: str) -> bytes:
    raw = text.encode(errors="replace")[:_MAX_TEXT_BYTES]
    return struct.pack("<H", len(raw)) + raw


def _read_text(body: bytes, at: int) -> tuple[str, int]:
    (length,) = struct.unpack_from("<H", body, at)
    end = at + 2 + length
    if length > _MAX_TEXT_BYTES or end > len(body):
        raise ValueError(f"a text of {length} bytes")
    return body[at + 2 : end].decode(errors="ignore"), end


def _end(body: bytes, at: int) -> None:
    if len(body) != at:
        raise ValueError(f"{len(body)} bytes instead of {at}")
