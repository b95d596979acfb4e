"""A remote checkpoint's folder without its weights: small files, headers, and weights files full of holes.

What `open_checkpoint` needs to check and index it, in a few small reads: a model can be described and its
skeleton built while not one tensor has been moved.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from services.store.disk_cache.record import modified_ns
from services.store.origins.origin import RemoteFile
from services.store.origins.ranges import Ranges
from stoker.checkpoint import manifest
from stoker.checkpoint.adapter import MAX_ADAPTER_CONFIG_BYTES
from stoker.checkpoint.digests import digest
from stoker.checkpoint.folder import resolve_file
from stoker.checkpoint.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_WEIGHTS_NAME,
    CONFIG_NAME,
    MANIFEST_NAME,
    SHARD_INDEX_NAME,
    WEIGHTS_NAME,
)
from stoker.checkpoint.safetensors_header import LENGTH_BYTES, header_length
from stoker.checkpoint.shards import MAX_SHARD_INDEX_BYTES, weight_map
from stoker.checkpoint.small_files import MAX_SMALL_FILE_BYTES, MAX_SMALL_FILES_BYTES, SMALL_FILE_NAMES
from stoker.errors import CheckpointInvalid
from stoker.units import KIB, format_bytes

_FIRST_READ_BYTES = 256 * KIB
"""Of a weights file: most headers fit."""

_READERS = 8
_OF_ADAPTERS = (ADAPTER_CONFIG_NAME, ADAPTER_WEIGHTS_NAME)
_DESCRIBING = (MANIFEST_NAME, SHARD_INDEX_NAME, WEIGHTS_NAME, *SMALL_FILE_NAMES, *_OF_ADAPTERS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Described:
    """Files of a checkpoint, as they are at the origin now.

    Attributes:
        files: By name; also weights files.
    """

    files: dict[str, RemoteFile]


def describe(ranges: Ranges, *, known: Collection[str] = ()) -> Described:
    """Ask which describing files are there, and those of `known` names.

    What lies beside them and belongs to the other kind, model or adapter, is left out: adapters are stored
    with copies of their base's tokenizer.

    Raises:
        StokerError: The origin can't be asked, or refuses.
    """
    found = ranges.find([*dict.fromkeys([*_DESCRIBING, *known])])
    is_adapter = ADAPTER_CONFIG_NAME in found and CONFIG_NAME not in found
    return Described(
        files={name: file for name, file in found.items() if (name in _OF_ADAPTERS) == is_adapter}
    )


def build_skeleton(ranges: Ranges, described: Described, folder: Path) -> dict[str, RemoteFile]:
    """Fill an empty folder with a checkpoint's small files and hollow weights files; returns all its files.

    Args:
        ranges: Of the checkpoint's origin.
        described: What is there.
        folder: Links resolved.

    Raises:
        CheckpointInvalid: It is none, or hostile.
        StokerError: The origin can't be read.
        OSError: The disk can't.
    """
    found = described.files
    small = [found[name] for name in (*SMALL_FILE_NAMES, ADAPTER_CONFIG_NAME) if name in found]
    if sum(file.size_bytes for file in small) > MAX_SMALL_FILES_BYTES:
        raise CheckpointInvalid(
            f"{ranges.origin.uri}: its small files have more than {format_bytes(MAX_SMALL_FILES_BYTES)} "
            "together; remove what does not belong to the model"
        )
    limits = {
        MANIFEST_NAME: manifest.MAX_MANIFEST_BYTES,
        SHARD_INDEX_NAME: MAX_SHARD_INDEX_BYTES,
        ADAPTER_CONFIG_NAME: MAX_ADAPTER_CONFIG_BYTES,
    }
    whole = small + [found[name] for name in (MANIFEST_NAME, SHARD_INDEX_NAME) if name in found]
    with ThreadPoolExecutor(max_workers=_READERS, thread_name_prefix="skeleton") as threads:
        contents = threads.map(
            lambda file: ranges.read_whole(file, limit_bytes=limits.get(file.name, MAX_SMALL_FILE_BYTES)),
            whole,
        )
        for file, content in zip(whole, contents, strict=True):
            (folder / file.name).write_bytes(content)
        weights = _weights(ranges, found, folder)
        for file, head in zip(weights, threads.map(lambda file: _head(ranges, file), weights), strict=True):
            with (folder / file.name).open("wb") as hollow:
                hollow.write(head)
                hollow.truncate(file.size_bytes)
    files = {file.name: file for file in [*whole, *weights]}
    for file in files.values():
        stamp = modified_ns(file)
        os.utime(folder / file.name, ns=(stamp, stamp))
    return files


def unchanged(now: Described, files: Collection[RemoteFile]) -> bool:
    """Tell whether a checkpoint's files, and those it could have, are as they were; pure."""
    then = {file.name: file for file in files}
    stray = {WEIGHTS_NAME} - then.keys()  # beside a manifest that doesn't name it
    return then == {name: file for name, file in now.files.items() if name not in stray}


def _weights(ranges: Ranges, found: dict[str, RemoteFile], folder: Path) -> Sequence[RemoteFile]:
    """Return the weights files; checks the small files that a manifest vouches for."""
    uri = ranges.origin.uri
    if ADAPTER_CONFIG_NAME in found:
        return _find(ranges, [ADAPTER_WEIGHTS_NAME])
    if MANIFEST_NAME in found:
        told = manifest.parse((folder / MANIFEST_NAME).read_bytes(), where=f"{uri}/{MANIFEST_NAME}")
        for small in told.small_files:
            path = folder / small.name
            if not path.is_file() or digest(path.read_bytes()) != small.digest:
                raise CheckpointInvalid(
                    f"{uri}/{small.name} is missing or not what {MANIFEST_NAME} says; upload it again"
                )
        sizes = {file.name: file.size_bytes for file in told.files}
        files = _find(ranges, list(sizes))
        wrong = next((file for file in files if file.size_bytes != sizes[file.name]), None)
        if wrong is not None:
            raise CheckpointInvalid(
                f"{uri}/{wrong.name} has {wrong.size_bytes:,} bytes, {MANIFEST_NAME} says "
                f"{sizes[wrong.name]:,}; upload it again"
            )
        return files
    if WEIGHTS_NAME in found:
        return [found[WEIGHTS_NAME]]
    if SHARD_INDEX_NAME in found:
        names = sorted(set(weight_map(folder / SHARD_INDEX_NAME).values()))
        for name in names:
            resolve_file(folder, name)  # refuses what is no plain name
        return _find(ranges, names)
    raise CheckpointInvalid(
        f"{uri} has neither {WEIGHTS_NAME} nor {SHARD_INDEX_NAME}, and no {ADAPTER_CONFIG_NAME}; give the "
        "folder of a checkpoint, or of a LoRA adapter in PEFT's format"
    )


def _find(ranges: Ranges, names: list[str]) -> list[RemoteFile]:
    found = ranges.find(names)
    missing = next((name for name in names if name not in found), None)
    if missing is not None:
        raise CheckpointInvalid(f"{ranges.origin.uri}/{missing} is missing; upload the checkpoint again")
    return [found[name] for name in names]


def _head(ranges: Ranges, file: RemoteFile) -> bytes:
    """Return a weights file's header with its length."""
    where = f"{ranges.origin.uri}/{file.name}"
    first = bytearray(min(_FIRST_READ_BYTES, file.size_bytes))
    ranges.read_into(file, memoryview(first), offset=0)
    end = LENGTH_BYTES + header_length(bytes(first[:LENGTH_BYTES]), file_bytes=file.size_bytes, where=where)
    rest = bytearray(max(0, end - len(first)))
    ranges.read_into(file, memoryview(rest), offset=len(first))
    return bytes(first[:end]) + bytes(rest)
