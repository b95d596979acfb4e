"""Plan the exact bytes of a weights file before one of them is written. Pure.

The header is padded with spaces so that data starts on a 4096-byte boundary; every tensor starts on a
256-byte boundary. The format allows no holes, so where a tensor ends off the boundary and bytes follow, a
filler entry (`__stoker_pad__.<k>`, U8, zeros) closes the gap. Tensors keep the order they are given in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.checkpoint.layout import DATA_ALIGNMENT_BYTES, PAD_PREFIX, TENSOR_ALIGNMENT_BYTES, is_padding
from stoker.checkpoint.safetensors_header import LENGTH_BYTES, MAX_HEADER_BYTES, METADATA_KEY
from stoker.errors import CheckpointInvalid
from stoker.units import align_up

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """A tensor to be written, as dtype, shape and size; `nbytes` agrees with both."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedEntry:
    """An entry of the file: a tensor, or filler.

    Attributes:
        tensor: What is written; its name says whether it is filler.
        offset: First byte, counted from the start of the file.
    """

    tensor: PlannedTensor
    offset: int

    @property
    def is_filler(self) -> bool:
        """Whether the entry only closes a gap; its bytes are zeros."""
        return is_padding(self.tensor.name)


@dataclass(frozen=True, slots=True, kw_only=True)
class FilePlan:
    """A file that can be written front to back.

    Attributes:
        header: Length prefix, JSON and spaces; its length is where data starts.
        entries: In the order of the file, filler included; without holes.
        size_bytes: Of the whole file.
    """

    header: bytes
    entries: tuple[PlannedEntry, ...]
    size_bytes: int


def plan_file(tensors: Sequence[PlannedTensor]) -> FilePlan:
    """Return the file that holds `tensors` in their order.

    Raises:
        CheckpointInvalid: The header would be over the format's limit.
    """
    placed = _place(tensors)
    header = _header(placed)
    data_end = placed[-1][1] + placed[-1][0].nbytes if placed else 0
    entries = tuple(PlannedEntry(tensor=tensor, offset=len(header) + begin) for tensor, begin in placed)
    return FilePlan(header=header, entries=entries, size_bytes=len(header) + data_end)


def _place(tensors: Sequence[PlannedTensor]) -> list[tuple[PlannedTensor, int]]:
    """Return tensors and fillers with their offsets in the data section."""
    placed: list[tuple[PlannedTensor, int]] = []
    position = fillers = 0
    for tensor in tensors:
        gap = align_up(position, TENSOR_ALIGNMENT_BYTES) - position
        if gap:
            filler = PlannedTensor(name=f"{PAD_PREFIX}{fillers}", dtype="U8", shape=(gap,), nbytes=gap)
            placed.append((filler, position))
            position += gap
            fillers += 1
        placed.append((tensor, position))
        position += tensor.nbytes
    return placed


def _header(placed: Sequence[tuple[PlannedTensor, int]]) -> bytes:
    table: dict[str, object] = {METADATA_KEY: {"format": "pt"}}
    for tensor, begin in placed:
        table[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [begin, begin + tensor.nbytes],
        }
    text = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    length = align_up(LENGTH_BYTES + len(text), DATA_ALIGNMENT_BYTES) - LENGTH_BYTES
    if length > MAX_HEADER_BYTES:
        raise CheckpointInvalid(
            f"{len(placed):,} tensors need a header of {length:,} bytes; the format's limit is "
            f"{MAX_HEADER_BYTES:,}. Nothing can store this checkpoint in one safetensors file."
        )
    return length.to_bytes(LENGTH_BYTES, "little") + text.ljust(length)
