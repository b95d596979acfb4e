"""Find the weights files of a checkpoint that nobody converted, from an index that nobody vouches for."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.checkpoint import hostile_json
from stoker.checkpoint.folder import read_bounded, resolve_file
from stoker.checkpoint.layout import SHARD_INDEX_NAME, WEIGHTS_NAME
from stoker.errors import CheckpointInvalid

if TYPE_CHECKING:
    from pathlib import Path

MAX_SHARDS = 10_000
MAX_SHARD_INDEX_BYTES = 100_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """The files of a checkpoint.

    Attributes:
        paths: Real paths by file name, in the order of their names.
        listed: The file of each tensor as the index has it; empty where there is no index.
    """

    paths: dict[str, Path]
    listed: dict[str, str]


def find_shards(
    folder: Path,
    *,
    single_name: str = WEIGHTS_NAME,
    index_name: str = SHARD_INDEX_NAME,
    suffix: str = ".safetensors",
    required: bool = True,
) -> Shards:
    """Return the weights files that the checkpoint in a resolved folder is made of.

    A single file wins over an index, as in transformers.

    Args:
        folder: A path that `resolve_folder` returned.
        single_name: The file that holds everything.
        index_name: The JSON file that lists the shards.
        suffix: What a shard's name must end with.
        required: Whether a folder without either is an error; else it has no files.

    Raises:
        CheckpointInvalid: There are none, one is missing, or the index is hostile.
    """
    single = resolve_file(folder, single_name)
    if single is not None:
        return Shards(paths={single_name: single}, listed={})
    index_path = resolve_file(folder, index_name)
    if index_path is None:
        if required:
            raise CheckpointInvalid(f"{folder}: {_why_nothing_to_serve(folder)}")
        return Shards(paths={}, listed={})
    paths: dict[str, Path] = {}
    listed = weight_map(index_path, suffix)
    for name in sorted(set(listed.values())):
        path = resolve_file(folder, name)
        if path is None:
            raise CheckpointInvalid(
                f"{folder / name} is missing, {index_name} lists it; fetch the checkpoint again."
            )
        paths[name] = path
    return Shards(paths=paths, listed=listed)


def weight_map(index_path: Path, suffix: str = ".safetensors") -> dict[str, str]:
    """Return the file of each tensor as the index at a resolved path has it.

    Raises:
        CheckpointInvalid: The index is hostile.
    """
    where = str(index_path)
    table = hostile_json.parse_object(
        read_bounded(index_path, limit_bytes=MAX_SHARD_INDEX_BYTES), where=where
    )
    listed = table.get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise CheckpointInvalid(
            f"{where}: `weight_map` must be an object with entries; fetch the file again."
        )
    names = {hostile_json.require_str(name, where=where, field="weight_map") for name in listed.values()}
    if len(names) > MAX_SHARDS:
        raise CheckpointInvalid(
            f"{where}: more than {MAX_SHARDS:,} shards; this is not a checkpoint's index."
        )
    for name in names:
        if not name.endswith(suffix):
            raise CheckpointInvalid(
                f"{where}: {name[:200]!r} is not the name of a {suffix} file; fetch it again."
            )
    return listed


def _why_nothing_to_serve(folder: Path) -> str:
    try:
        names = sorted(os.listdir(folder))  # noqa: PTH208 - names are needed, not paths
    except OSError as error:
        return f"cannot be listed: {error.strerror}."
    for suffix, kind in (
        (".bin", "a pickle"),
        (".pt", "a pickle"),
        (".pth", "a pickle"),
        (".gguf", "a GGUF"),
    ):
        if any(name.endswith(suffix) for name in names):
            return f"holds {kind} checkpoint, which is not served in place; run `stoker convert` first."
    return f"has neither {WEIGHTS_NAME} nor {SHARD_INDEX_NAME}; give the folder of a checkpoint."
