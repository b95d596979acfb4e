"""What the store knows of checkpoints on this host: opened once, believed while their files stay the same."""

from __future__ import annotations

import asyncio
import functools
import os
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from services.store.adapters import describe_adapter, describe_far_adapter
from services.store.far_weights import FarWeights
from stoker.checkpoint.adapter import adapter_index, is_adapter
from stoker.checkpoint.attention_facts import read_attention_facts
from stoker.checkpoint.dtypes import TORCH_NAMES
from stoker.checkpoint.execution_order import execution_order
from stoker.checkpoint.folder import read_bounded, resolve_file, resolve_folder
from stoker.checkpoint.index import CheckpointIndex, open_all_ranks
from stoker.checkpoint.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_LAYOUT,
    CONFIG_NAME,
    MANIFEST_NAME,
    SHARD_INDEX_NAME,
)
from stoker.checkpoint.manifest import TensorRecord
from stoker.checkpoint.model_facts import MAX_CONFIG_BYTES
from stoker.checkpoint.reading import FileSignature
from stoker.errors import CheckpointInvalid, InvalidRequest
from stoker.units import MIB
from stoker.v1 import model_pb2

MAX_ENTRIES = 1024
_MAX_ATTACHED_FILE_BYTES = 8 * MIB
_ATTACHED_FILES = (CONFIG_NAME, "generation_config.json", ADAPTER_CONFIG_NAME)


@dataclass(frozen=True, slots=True, kw_only=True)
class CatalogEntry:
    """A checkpoint on this host, its headers read.

    Attributes:
        index: Files and tensors.
        info: What is told about it.
        tensors: In execution order; of a checkpoint that is cut, rank by rank.
        signatures: Of the weights files, by name, when their headers were read.
        attached_files: Content of the configs that go with every attach.
        folder_signature: Changes when anything that the index was made from does.
    """

    index: CheckpointIndex
    info: model_pb2.CheckpointInfo
    tensors: tuple[TensorRecord, ...]
    signatures: dict[str, FileSignature]
    attached_files: dict[str, bytes]
    folder_signature: tuple[FileSignature | None, ...]
    watched: tuple[str, ...]
    """What `folder_signature` is made of: paths as text, for they are looked at before every load."""
    far: FarWeights | None = None
    """How its weights come when they are not, or not all, in its folder; None where they are."""
    attach_tables: dict[tuple[range, bool], bytes] = field(
        init=False, default_factory=dict, compare=False, repr=False
    )
    """Tensor tables of attach replies, serialised at the first attach, by the files that they tell of and
    whether they do so by columns."""

    @property
    def uri(self) -> str:
        """What it is known by: its folder, or where it comes from."""
        return str(self.info.uri)

    @property
    def identity(self) -> tuple[str, str]:
        """What tells it from every other checkpoint and from itself after a change."""
        return self.uri, self.index.revision


def refuse_cut_base(entry: CatalogEntry) -> None:
    """Refuse adapters for a checkpoint that is cut.

    Raises:
        CheckpointInvalid: It is.
    """
    if entry.index.ranks > 1:
        raise CheckpointInvalid(
            f"{entry.uri} is cut for {entry.index.ranks} tensor-parallel ranks, and adapters are added to "
            "checkpoints in one piece only: deploy the adapter with a conversion without --tensor-parallel",
            param="adapters",
        )


class OpensRemote(Protocol):
    """What knows checkpoints that are elsewhere; any thread."""

    def known_as(self, uri: str) -> str | None:
        """Return `CatalogEntry.uri` of what `uri` names; None when that is not of a remote kind."""

    def open(self, uri: str, *, revision: str) -> CatalogEntry:
        """Return the checkpoint at a remote uri; blocks for a few small reads from its origin.

        Args:
            uri: As `known_as` returned it.
            revision: The one that will do without asking the origin; empty = what the origin has now.
        """

    def on_disk(self) -> list[CatalogEntry]:
        """Return what the disk cache has."""


class Catalog:
    """Opens checkpoints off the event loop and remembers the last `MAX_ENTRIES`."""

    def __init__(self, *, allowed_roots: tuple[Path, ...], remote: OpensRemote | None = None) -> None:
        """Make an empty one.

        Args:
            allowed_roots: Folders that checkpoints may lie under; none = anywhere.
            remote: Opens what is elsewhere.
        """
        self._remote = remote
        self._remote_threads = ThreadPoolExecutor(max_workers=8, thread_name_prefix="catalog-remote")
        self._roots = tuple(root.resolve() for root in allowed_roots)
        self._entries: OrderedDict[str, CatalogEntry] = OrderedDict()
        self._threads = ThreadPoolExecutor(max_workers=4, thread_name_prefix="catalog")

    async def open(self, uri: str, *, revision: str = "") -> CatalogEntry:
        """Return the checkpoint at `uri`, with all its ranks; a known one costs a stat per file.

        Args:
            uri: An absolute path, `file://`, or of a remote kind: see `services.store.origins.uris`.
            revision: Refuse anything else; empty = whatever is there.

        Raises:
            InvalidRequest: The uri is of no kind that is supported, or outside the allowed folders.
            NotFound: There is no such folder.
            CheckpointInvalid: It cannot be served, or its revision is another.
        """
        loop = asyncio.get_running_loop()
        place = None if self._remote is None else self._remote.known_as(uri)
        if self._remote is None or place is None:
            entry = await loop.run_in_executor(self._threads, self._open, uri)
        else:
            ask = functools.partial(self._remote.open, place, revision=revision)
            entry = await loop.run_in_executor(self._remote_threads, ask)
        self._remember(entry)
        if revision and revision != entry.index.revision:
            raise CheckpointInvalid(
                f"{uri} is at revision {entry.index.revision}, asked for was {revision}: its files were "
                "changed; deploy the model again, or ask for this revision or none"
            )
        return entry

    async def describe_adapter(self, uri: str, *, checkpoint_uri: str) -> model_pb2.AdapterSpec:
        """Return what the adapter at `uri` is, which fits the checkpoint.

        Args:
            uri: As for `open`.
            checkpoint_uri: As for `open`.

        Raises:
            InvalidRequest, NotFound: As `open`.
            CheckpointInvalid: It is damaged, of an unsupported kind, or for another base.
        """
        entry = await self.open(checkpoint_uri)
        refuse_cut_base(entry)
        tensors = {tensor.name: tensor for tensor in entry.tensors}
        if self._remote is not None and self._remote.known_as(uri) is not None:
            return describe_far_adapter(await self.open(uri), tensors, checkpoint=entry.uri)

        def describe() -> model_pb2.AdapterSpec:
            return describe_adapter(self._folder(uri), tensors, checkpoint=entry.uri)

        return await asyncio.get_running_loop().run_in_executor(self._threads, describe)

    async def known_as(self, uri: str) -> str:
        """Return `CatalogEntry.uri` of what `uri` names, without opening it.

        Raises:
            InvalidRequest: As `open`.
            NotFound: As `open`.
        """
        place = None if self._remote is None else self._remote.known_as(uri)
        if place is not None:
            return place
        loop = asyncio.get_running_loop()
        return str(await loop.run_in_executor(self._threads, self._folder, uri))

    async def find_on_disk(self) -> None:
        """Learn what the disk cache has from before."""
        if self._remote is not None:
            loop = asyncio.get_running_loop()
            for entry in await loop.run_in_executor(self._remote_threads, self._remote.on_disk):
                self._remember(entry)

    def entries(self) -> list[CatalogEntry]:
        """Return what is known, least recently used first."""
        return list(self._entries.values())

    def close(self) -> None:
        """Let the threads end."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        self._remote_threads.shutdown(wait=False, cancel_futures=True)

    def _open(self, uri: str) -> CatalogEntry:
        # By its text: a `Path` of what is asked for again and again takes longer than all looks at its files.
        known = self._unchanged(os.path.realpath(uri)) if uri.startswith("/") and "\0" not in uri else None
        if known is not None:
            return known
        folder = self._folder(uri)
        return self._unchanged(str(folder)) or read_entry(folder)

    def _unchanged(self, folder: str) -> CatalogEntry | None:
        """Return what is known of a resolved folder, if nothing of it was changed since."""
        known = self._entries.get(folder)
        return known if known and known.folder_signature == _folder_signature(known.watched) else None

    def _remember(self, entry: CatalogEntry) -> None:
        self._entries[entry.uri] = entry
        self._entries.move_to_end(entry.uri)
        while len(self._entries) > MAX_ENTRIES:
            self._entries.popitem(last=False)

    def _folder(self, uri: str) -> Path:
        folder = resolve_folder(local_path(uri))
        if self._roots and not any(folder.is_relative_to(root) for root in self._roots):
            raise InvalidRequest(
                f"{uri} lies outside of the folders that this store serves: "
                f"{', '.join(map(str, self._roots))}; see STOKER_STORE_ALLOWED_ROOTS"
            )
        return folder


def local_path(uri: str) -> Path:
    """Return the absolute path that `uri` names; pure.

    Raises:
        InvalidRequest: It is neither an absolute path nor `file://`.
    """
    supported = (
        "supported are absolute paths and file:// of a folder that this host can see, s3://, gs://, az://, "
        "http(s):// and hf://"
    )
    if "\0" in uri or len(uri) > os.pathconf("/", "PC_PATH_MAX"):
        raise InvalidRequest(f"{uri[:200]!r} is no path; {supported}", param="checkpoint_uri")
    if uri.startswith("/"):
        return Path(uri)
    parts = urlsplit(uri)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"} and parts.path.startswith("/"):
        return Path(unquote(parts.path))
    what = f"the scheme {parts.scheme}://" if "://" in uri else "a relative path"
    raise InvalidRequest(f"{uri!r} names {what}; {supported}", param="checkpoint_uri")


def read_entry(folder: Path) -> CatalogEntry:
    """Return what is in a resolved folder; blocks for a few small reads.

    Args:
        folder: With all links resolved.

    Raises:
        StokerError: As `open_all_ranks`.
    """
    index = adapter_index(folder) if is_adapter(folder) else open_all_ranks(folder)
    watched = _watched(index)
    before = _folder_signature(watched)
    configs = {name: _read_config(folder, name) for name in _ATTACHED_FILES if name in index.small_files}
    return CatalogEntry(
        index=index,
        info=_info(index, configs.get(CONFIG_NAME, b"{}")),
        tensors=_in_execution_order(index),
        signatures={file.name: _signature_of_file(file.path, file.size_bytes) for file in index.files},
        attached_files=configs,
        folder_signature=before,
        watched=watched,
    )


def _read_config(folder: Path, name: str) -> bytes:
    path = resolve_file(folder, name)
    if path is None:
        raise CheckpointInvalid(f"{folder / name} vanished while the checkpoint was opened; try again")
    limit = MAX_CONFIG_BYTES if name == CONFIG_NAME else _MAX_ATTACHED_FILE_BYTES
    return read_bounded(path, limit_bytes=limit)


def _signature_of_file(path: Path, size_bytes: int) -> FileSignature:
    signature = _signature(path)
    if signature is None or signature.size_bytes != size_bytes:
        raise CheckpointInvalid(f"{path} changed while its header was read; try again when it is complete")
    return signature


def _watched(index: CheckpointIndex) -> tuple[str, ...]:
    names = (".", MANIFEST_NAME, SHARD_INDEX_NAME, *index.small_files)
    return tuple([str(index.path / name) for name in names] + [str(file.path) for file in index.files])


def _folder_signature(watched: Sequence[str]) -> tuple[FileSignature | None, ...]:
    return tuple(_signature(path) for path in watched)


def _signature(path: str | Path) -> FileSignature | None:
    try:
        return FileSignature.of(os.stat(path))  # noqa: PTH116 - a Path of each costs more than the call
    except OSError:
        return None


def _info(index: CheckpointIndex, config_text: bytes) -> model_pb2.CheckpointInfo:
    if index.layout == ADAPTER_LAYOUT:
        return model_pb2.CheckpointInfo(
            uri=str(index.path),
            revision=index.revision,
            layout=index.layout,
            weight_bytes=index.tensor_bytes,
            file_bytes=index.weight_bytes,
            dtype=_dtype_name(index),
        )
    attention = read_attention_facts(config_text, where=str(index.path / CONFIG_NAME))
    layers = 1 + max((tensor.layer for tensor in index.tensors if tensor.layer is not None), default=-1)
    return model_pb2.CheckpointInfo(
        uri=str(index.path),
        revision=index.revision,
        layout=index.layout,
        weight_bytes=index.tensor_bytes,
        file_bytes=index.weight_bytes,
        architecture=index.facts.architecture or "",
        dtype=_dtype_name(index),
        context_tokens=min(index.facts.context_length or 0, 2**32 - 1),
        vocabulary_tokens=min(index.facts.vocab_size or 0, 2**32 - 1),
        layers=attention.layers or layers,
        kv_bytes_per_token=attention.kv_bytes_per_token(index.dtype or ""),
        tensor_parallel=index.ranks if index.ranks > 1 else 0,
    )


def _dtype_name(index: CheckpointIndex) -> str:
    """Return torch's name of the dtype that most bytes have."""
    dtype = index.dtype or ""
    return TORCH_NAMES.get(dtype, dtype.lower())


def _in_execution_order(index: CheckpointIndex) -> tuple[TensorRecord, ...]:
    """Return the tensors, those of one rank after those of another."""
    own = [(file.name,) for file in index.files] if index.ranks > 1 else [tuple(f.name for f in index.files)]
    found: list[TensorRecord] = []
    for files in own:
        by_name = {tensor.name: tensor for tensor in index.tensors if tensor.file in files}
        found += [by_name[placed.name] for placed in execution_order(by_name)]
    return tuple(found)
