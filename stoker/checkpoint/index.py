"""The one view that everything serves from: which files, which tensors in them, which revision.

`open_checkpoint` reads headers and small JSON files, never weights, and needs no torch. A folder with
`stoker.json` is *converted*: its manifest and the file's own header must agree. Any other folder of
safetensors is served *in place*: a single `model.safetensors`, or the shards that
`model.safetensors.index.json` lists.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from stoker.checkpoint import digests, manifest
from stoker.checkpoint.cuts import Cut
from stoker.checkpoint.execution_order import execution_order
from stoker.checkpoint.folder import open_regular, read_bounded, read_exactly, resolve_file, resolve_folder
from stoker.checkpoint.layout import (
    CHUNK_BYTES,
    CONFIG_NAME,
    MANIFEST_NAME,
    SHARD_INDEX_NAME,
    chunk_count,
    is_padding,
)
from stoker.checkpoint.manifest import TensorRecord
from stoker.checkpoint.model_facts import MAX_CONFIG_BYTES, ModelFacts, read_facts
from stoker.checkpoint.safetensors_header import LENGTH_BYTES, header_length, parse_header
from stoker.checkpoint.shards import find_shards
from stoker.checkpoint.small_files import find_small_files
from stoker.errors import CheckpointInvalid, InvalidRequest
from stoker.ids import Revision

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stoker.checkpoint.safetensors_header import SafetensorsHeader


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFile:
    """A file of weights, ready to be read.

    Attributes:
        name: Its name in the folder.
        path: Its real path, links resolved; open this one.
        size_bytes: Whole size, header included.
        data_start: Where tensor data starts, in bytes.
        chunk_digests: One per chunk of the index's `chunk_bytes`; empty in place, where nobody made any.
    """

    name: str
    path: Path
    size_bytes: int
    data_start: int
    chunk_digests: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointIndex:
    """What a checkpoint folder holds.

    Attributes:
        path: The folder, links resolved.
        layout: `converted` has `stoker.json`, aligned tensors and digests; `in_place` has none of them;
            `adapter` is no model but what is added to one (`adapter.adapter_index`).
        revision: Changes when the bytes do; 32 hex digits. In place: by headers, sizes, times and config.
        files: Weights files; by rank, or by shard name.
        tensors: By file and offset, filler left out.
        tied_groups: Names that share a stored tensor; the first is the stored one. Empty in place.
        small_files: Names of the small files present.
        chunk_bytes: What one chunk of a file has.
        facts: What `config.json` says.
        rank: Which tensor-parallel rank this is, from 0.
        ranks: How many there are; files and tensors are this one's, or by rank in `open_all_ranks`.
        cuts: How tensors of a checkpoint of several ranks are cut; those not listed are whole.
    """

    path: Path
    layout: Literal["converted", "in_place", "adapter"]
    revision: Revision
    files: tuple[CheckpointFile, ...]
    tensors: tuple[TensorRecord, ...]
    tied_groups: tuple[tuple[str, ...], ...]
    small_files: tuple[str, ...]
    chunk_bytes: int
    facts: ModelFacts
    rank: int = 0
    ranks: int = 1
    cuts: Mapping[str, Cut] = field(default_factory=dict)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights files, headers and filler included: what a load moves."""
        return sum(file.size_bytes for file in self.files)

    @property
    def tensor_bytes(self) -> int:
        """Bytes of the tensors alone."""
        return sum(tensor.nbytes for tensor in self.tensors)

    @property
    def chunk_count(self) -> int:
        """Chunks of all files; each file starts a new one."""
        return sum(chunk_count(file.size_bytes, self.chunk_bytes) for file in self.files)

    @property
    def bytes_by_dtype(self) -> dict[str, int]:
        """Bytes of tensors per dtype, the largest first."""
        totals: Counter[str] = Counter()
        for tensor in self.tensors:
            totals[tensor.dtype] += tensor.nbytes
        return dict(totals.most_common())

    @property
    def dtype(self) -> str | None:
        """The dtype that most bytes have; None for a checkpoint without tensors."""
        return next(iter(self.bytes_by_dtype), None)


def open_checkpoint(path: str | os.PathLike[str], *, rank: int | None = None) -> CheckpointIndex:
    """Return the index of the checkpoint in the folder `path`; blocks for a few small reads.

    Args:
        path: A folder, converted or in place.
        rank: Which rank of a checkpoint that is cut for tensor parallelism; None or 0 for one that isn't.

    Raises:
        NotFound: There is no such folder.
        InvalidRequest: There is no such rank.
        CheckpointInvalid: Files are missing, truncated, hostile, or of a format that must be converted.
    """
    folder = resolve_folder(path)
    manifest_path = resolve_file(folder, MANIFEST_NAME)
    if manifest_path is not None:
        found = read_manifest(folder)
        check_rank(folder, rank, found.ranks)
        return _open_converted(folder, found, rank or 0)
    check_rank(folder, rank, 1)
    return _open_in_place(folder)


def open_all_ranks(path: str | os.PathLike[str]) -> CheckpointIndex:
    """Return the index of a checkpoint with the files of all its ranks, in their order.

    A checkpoint that is cut has each tensor once per rank then, under one name: its file tells the rank. All
    others are as `open_checkpoint` gives them.

    Raises:
        NotFound, CheckpointInvalid: As `open_checkpoint`.
    """
    folder = resolve_folder(path)
    if resolve_file(folder, MANIFEST_NAME) is None:
        return _open_in_place(folder)
    return _open_converted(folder, read_manifest(folder), None)


def check_rank(folder: Path, rank: int | None, ranks: int) -> None:
    """Refuse a rank that a checkpoint does not have, or none where it is cut.

    Raises:
        CheckpointInvalid: It is cut, and no rank is named.
        InvalidRequest: There is no such rank.
    """
    if rank is None and ranks > 1:
        raise CheckpointInvalid(
            f"{folder} is cut for {ranks} tensor-parallel ranks, one file each: load it in {ranks} processes "
            f"with stoker.load_model(..., tp_size={ranks}), or deploy it. To push it or run it in one "
            "process, take the original, or a conversion of it without --tensor-parallel."
        )
    if rank is not None and not 0 <= rank < ranks:
        raise InvalidRequest(
            f"{folder} has no rank {rank}: it is cut for {ranks}; convert the original with "
            "--tensor-parallel to cut it otherwise.",
            param="rank",
        )


def read_manifest(folder: Path) -> manifest.Manifest:
    """Return the checked manifest of a converted checkpoint's resolved folder.

    Raises:
        CheckpointInvalid: There is none, or it is damaged.
    """
    path = resolve_file(folder, MANIFEST_NAME)
    if path is None:
        raise CheckpointInvalid(f"{folder} has no {MANIFEST_NAME}; run `stoker convert` first.")
    return manifest.parse(read_bounded(path, limit_bytes=manifest.MAX_MANIFEST_BYTES), where=str(path))


def read_header(path: Path) -> tuple[SafetensorsHeader, bytes, int]:
    """Return the checked header of a safetensors file, its JSON text, and the file's size.

    Args:
        path: A resolved path.

    Raises:
        CheckpointInvalid: The file is truncated, hostile, or cannot be read.
    """
    descriptor = open_regular(path)
    try:
        size = os.fstat(descriptor).st_size
        prefix = os.pread(descriptor, LENGTH_BYTES, 0)
        text = bytearray(header_length(prefix, file_bytes=size, where=str(path)))
        read_exactly(descriptor, memoryview(text), LENGTH_BYTES, where=str(path))
    finally:
        os.close(descriptor)
    return parse_header(bytes(text), file_bytes=size, where=str(path)), bytes(text), size


def weights_path(folder: Path, file: manifest.WeightsFile) -> Path:
    """Return the real path of a manifest's file, which exists and has the size that the manifest says.

    Raises:
        CheckpointInvalid: It is missing or has another size.
    """
    path = resolve_file(folder, file.name)
    if path is None:
        raise CheckpointInvalid(f"{folder / file.name} is missing; convert the checkpoint again.")
    size = path.stat().st_size
    if size != file.size_bytes:
        raise CheckpointInvalid(
            f"{path} has {size:,} bytes, {MANIFEST_NAME} says {file.size_bytes:,}: it was cut or changed; "
            "convert the checkpoint again."
        )
    return path


def _open_converted(folder: Path, found: manifest.Manifest, rank: int | None) -> CheckpointIndex:
    """Open one rank's files, or all ranks'."""
    files = []
    own = found.files if found.ranks == 1 or rank is None else (found.files[rank],)
    names = {file.name for file in own}
    tensors = tuple(tensor for tensor in found.tensors if tensor.file in names)
    records: dict[tuple[str, str], TensorRecord] = {(each.file, each.name): each for each in tensors}
    stored = 0
    for file in own:
        path = weights_path(folder, file)
        header, _, _ = read_header(path)
        for entry in header.tensors:
            if is_padding(entry.name):
                continue
            stored += 1
            record = records.get((file.name, entry.name))
            place = (file.name, header.data_start + entry.begin, entry.dtype, entry.shape)
            if record is None or (record.file, record.offset, record.dtype, record.shape) != place:
                raise CheckpointInvalid(
                    f"{path}: tensor {entry.name!r} is not where {MANIFEST_NAME} says; "
                    "convert the checkpoint again."
                )
        files.append(
            CheckpointFile(
                name=file.name,
                path=path,
                size_bytes=file.size_bytes,
                data_start=header.data_start,
                chunk_digests=file.chunk_digests,
            )
        )
    if stored != len(records):
        raise CheckpointInvalid(
            f"{folder}: {MANIFEST_NAME} lists {len(records):,} tensors, the files hold {stored:,}; "
            "convert the checkpoint again."
        )
    small = find_small_files(folder)
    absent = next((file.name for file in found.small_files if file.name not in small), None)
    if absent is not None:
        raise CheckpointInvalid(f"{folder / absent} is missing; convert the checkpoint again.")
    facts, _ = _facts(folder, small)
    return CheckpointIndex(
        path=folder,
        layout="converted",
        revision=found.revision,
        files=tuple(files),
        tensors=tensors,
        tied_groups=found.tied_groups,
        small_files=tuple(small),
        chunk_bytes=found.chunk_bytes,
        facts=facts,
        rank=rank or 0,
        ranks=found.ranks,
        cuts={cut.name: Cut(dim=cut.dim, blocks=cut.blocks) for cut in found.cuts},
    )


def _open_in_place(folder: Path) -> CheckpointIndex:
    small = find_small_files(folder)
    facts, config_text = _facts(folder, small)
    files: list[CheckpointFile] = []
    entries: dict[str, TensorRecord] = {}
    signature = [digests.digest(config_text)]
    shards = find_shards(folder)
    for name, path in shards.paths.items():
        header, text, size = read_header(path)
        files.append(
            CheckpointFile(
                name=name, path=path, size_bytes=size, data_start=header.data_start, chunk_digests=()
            )
        )
        signature += [name, digests.digest(text), str(size), str(path.stat().st_mtime_ns)]
        for entry in header.tensors:
            if is_padding(entry.name):
                continue
            if entry.name in entries:
                raise CheckpointInvalid(
                    f"{folder}: tensor {entry.name!r} is in {entries[entry.name].file} and in {name}; "
                    "fetch the checkpoint again."
                )
            entries[entry.name] = TensorRecord(
                name=entry.name,
                dtype=entry.dtype,
                shape=entry.shape,
                file=name,
                offset=header.data_start + entry.begin,
                nbytes=entry.nbytes,
                layer=None,
            )
    absent = next((name for name in shards.listed if name not in entries), None)
    if absent is not None:
        raise CheckpointInvalid(
            f"{folder / shards.listed[absent]} lacks the tensor {absent[:200]!r} of {SHARD_INDEX_NAME}; "
            "fetch the checkpoint again."
        )
    for name, path in small.items():
        status = path.stat()
        signature += [name, str(status.st_size), str(status.st_mtime_ns)]
    return CheckpointIndex(
        path=folder,
        layout="in_place",
        revision=Revision(digests.digest_of_texts(signature)),
        files=tuple(files),
        tensors=with_layers(entries),
        tied_groups=(),
        small_files=tuple(small),
        chunk_bytes=CHUNK_BYTES,
        facts=facts,
    )


def with_layers(entries: dict[str, TensorRecord]) -> tuple[TensorRecord, ...]:
    """Return tensors by file and offset, each with the layer that its name says."""
    layers = {placed.name: placed.layer for placed in execution_order(entries)}
    return tuple(
        TensorRecord(
            name=entry.name,
            dtype=entry.dtype,
            shape=entry.shape,
            file=entry.file,
            offset=entry.offset,
            nbytes=entry.nbytes,
            layer=layers[entry.name],
        )
        for entry in sorted(entries.values(), key=lambda entry: (entry.file, entry.offset, entry.nbytes))
    )


def _facts(folder: Path, small: dict[str, Path]) -> tuple[ModelFacts, bytes]:
    path = small.get(CONFIG_NAME)
    if path is None:
        raise CheckpointInvalid(
            f"{folder} has no {CONFIG_NAME}: it is no checkpoint's folder, or the checkpoint is incomplete; "
            "give another folder, or fetch it again."
        )
    text = read_bounded(path, limit_bytes=MAX_CONFIG_BYTES)
    return read_facts(text, where=str(path)), text
