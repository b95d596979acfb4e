"""Parse a safetensors header from bytes that nobody vouches for. Pure: bytes in, table out.

The format: 8 bytes little-endian header length, that many bytes of JSON (padded with spaces), tensor data.
Accepted is what safetensors 0.8 accepts, minus what it lets pass in silence: a key twice, unknown fields,
names that no module can have. Everything is checked before memory is taken for it.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stoker.checkpoint import hostile_json
from stoker.checkpoint.dtypes import DTYPE_BITS, tensor_bytes
from stoker.errors import CheckpointInvalid

if TYPE_CHECKING:
    from collections.abc import Sequence

LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000
"""The library's own limit."""

MAX_NAME_CHARACTERS = 1024
MAX_DIMENSIONS = 32
METADATA_KEY = "__metadata__"
_ENTRY_FIELDS = frozenset({"dtype", "shape", "data_offsets"})
_FETCH_AGAIN = "fetch the file again or convert from the original."


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor's place in a file.

    Attributes:
        name: As the model calls it.
        dtype: A key of `DTYPE_BITS`.
        shape: Element counts; `()` for a scalar.
        begin: First byte, counted from the start of the data section.
        end: One past the last byte, counted likewise.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        """Bytes that the tensor fills."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True, kw_only=True)
class SafetensorsHeader:
    """A checked header.

    Attributes:
        tensors: By place in the file; they cover the data section without holes or overlaps.
        data_start: Where the data section starts, in bytes from the start of the file.
        metadata: The free-form `__metadata__`.
    """

    tensors: tuple[TensorEntry, ...]
    data_start: int
    metadata: dict[str, str]


def header_length(prefix: bytes, *, file_bytes: int, where: str) -> int:
    """Return the length of the JSON text in bytes, checked against the file and the format's limit.

    Args:
        prefix: The first 8 bytes of the file (or fewer, where it is shorter).
        file_bytes: The file's whole size.
        where: Which file, for messages.

    Raises:
        CheckpointInvalid: The file is too short or the length cannot be.
    """
    if len(prefix) < LENGTH_BYTES or file_bytes < LENGTH_BYTES:
        raise CheckpointInvalid(f"{where}: {file_bytes} bytes are no safetensors file; {_FETCH_AGAIN}")
    (length,) = struct.unpack("<Q", prefix[:LENGTH_BYTES])
    if length > MAX_HEADER_BYTES:
        raise CheckpointInvalid(
            f"{where}: header length {length:,} is over the format's limit of {MAX_HEADER_BYTES:,} bytes; "
            f"this is no safetensors file, {_FETCH_AGAIN}"
        )
    if length > file_bytes - LENGTH_BYTES:
        raise CheckpointInvalid(
            f"{where}: header of {length:,} bytes in a file of {file_bytes:,} bytes; it is truncated, "
            f"{_FETCH_AGAIN}"
        )
    return int(length)


def parse_header(text: bytes, *, file_bytes: int, where: str) -> SafetensorsHeader:
    """Check and return the table that the JSON `text` describes.

    Args:
        text: The header without its length prefix.
        file_bytes: The file's whole size; the tensors must fill it exactly.
        where: Which file, for messages.

    Raises:
        CheckpointInvalid: Says what is wrong, with which tensor, and what to do.
    """
    if not text.startswith(b"{"):
        raise CheckpointInvalid(f"{where}: the header must start with '{{'; {_FETCH_AGAIN}")
    table = hostile_json.parse_object(text, where=where)
    metadata = _metadata(table.pop(METADATA_KEY, None), where)
    entries = [_entry(name, value, where) for name, value in table.items()]
    entries.sort(key=lambda entry: (entry.begin, entry.end))
    data_start = LENGTH_BYTES + len(text)
    _check_coverage(entries, data_bytes=file_bytes - data_start, where=where)
    return SafetensorsHeader(tensors=tuple(entries), data_start=data_start, metadata=metadata)


def check_name(name: str, *, where: str) -> str:
    """Return `name` if a tensor may be called so.

    Raises:
        CheckpointInvalid: Empty, too long, control characters, or something that reads as a path.
    """
    fault = _name_fault(name)
    if fault:
        raise CheckpointInvalid(f"{where}: the tensor name {name[:100]!r} {fault}; {_FETCH_AGAIN}")
    return name


def _name_fault(name: str) -> str:
    if not name:
        return "is empty"
    if len(name) > MAX_NAME_CHARACTERS:
        return f"is longer than {MAX_NAME_CHARACTERS} characters"
    if ".." in name or "\\" in name or name.startswith("/"):
        return "reads as a path"
    if not name.isprintable():
        return "has characters that cannot be printed"
    return ""


def _metadata(value: Any, where: str) -> dict[str, str]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise CheckpointInvalid(f"{where}: `{METADATA_KEY}` must be an object; {_FETCH_AGAIN}")
    return {
        key: hostile_json.require_str(text, where=where, field=f"{METADATA_KEY}.{key[:100]}")
        for key, text in value.items()
    }


def _entry(name: str, value: object, where: str) -> TensorEntry:
    check_name(name, where=where)
    fields = hostile_json.require_fields(value, _ENTRY_FIELDS, where=where, field=name)
    dtype = hostile_json.require_str(fields["dtype"], where=where, field=f"{name}.dtype")
    if dtype not in DTYPE_BITS:
        raise CheckpointInvalid(
            f"{where}: tensor {name!r} has the unknown dtype {dtype[:40]!r}; "
            f"known are {', '.join(DTYPE_BITS)}."
        )
    shape = _integers(fields["shape"], where, f"{name}.shape")
    if len(shape) > MAX_DIMENSIONS:
        raise CheckpointInvalid(f"{where}: tensor {name!r} has {len(shape)} dimensions; {_FETCH_AGAIN}")
    offsets = _integers(fields["data_offsets"], where, f"{name}.data_offsets")
    if len(offsets) != 2 or offsets[0] > offsets[1]:  # noqa: PLR2004 - begin and end
        raise CheckpointInvalid(f"{where}: tensor {name!r} has bad offsets {offsets[:4]}; {_FETCH_AGAIN}")
    begin, end = offsets
    nbytes = tensor_bytes(dtype, shape)
    if nbytes != end - begin:
        raise CheckpointInvalid(
            f"{where}: tensor {name!r} of {dtype} {list(shape)} does not fill the {end - begin:,} bytes that "
            f"its offsets name; {_FETCH_AGAIN}"
        )
    return TensorEntry(name=name, dtype=dtype, shape=shape, begin=begin, end=end)


def _integers(value: object, where: str, field: str) -> tuple[int, ...]:
    items = hostile_json.require_list(value, where=where, field=field)
    return tuple(hostile_json.require_int(item, where=where, field=field) for item in items)


def _check_coverage(entries: Sequence[TensorEntry], *, data_bytes: int, where: str) -> None:
    """Refuse holes, overlaps and a data section that is not exactly full."""
    position = 0
    for entry in entries:
        if entry.begin != position:
            kind = "overlaps the tensor before it" if entry.begin < position else "leaves a hole before it"
            raise CheckpointInvalid(
                f"{where}: tensor {entry.name!r} at {entry.begin:,} {kind} (expected {position:,}); "
                f"{_FETCH_AGAIN}"
            )
        position = entry.end
    if position != data_bytes:
        state = "is truncated" if position > data_bytes else "has bytes that no tensor owns"
        raise CheckpointInvalid(
            f"{where}: {state}: tensors need {position:,} bytes, the file has {data_bytes:,}; {_FETCH_AGAIN}"
        )
