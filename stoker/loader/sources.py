"""Where a checkpoint's bytes come from: the store daemon's pool or this host's disk, seen as one thing.

`open_source` decides, in this order:

1. A daemon was named: it is asked, and its refusals are the caller's.
2. `auto`, and a daemon listens: it is asked. A folder that it can't serve (not reachable, no room, not its
   folder) is loaded without it, also when it dies in the middle; a damaged checkpoint, and bytes that it
   can't bring, are refused either way: the disk would give the same, unverified.
3. Otherwise the folder is read. What is no folder of this host needs a daemon.
"""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol
from urllib.parse import unquote, urlsplit

from stoker.checkpoint.execution_order import execution_order
from stoker.checkpoint.folder import read_bounded, resolve_file
from stoker.checkpoint.index import CheckpointIndex, open_checkpoint
from stoker.checkpoint.small_files import MAX_SMALL_FILE_BYTES
from stoker.errors import CapacityError, InvalidRequest, LoadFailed, NotFound, PeerError
from stoker.loader.daemon import AUTO, find_socket
from stoker.loader.file_check import FileCheck, Verify, verify_named
from stoker.loader.file_memory import FileMemory, load_files, map_file

if TYPE_CHECKING:
    from collections.abc import Callable

    from stoker.attach import Attachment


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredTensor:
    """A tensor as it is stored.

    Attributes:
        name: As the model calls it.
        dtype: safetensors' name, e.g. `BF16`.
        shape: Element counts; `()` for a scalar.
        file: Index into the source's files.
        offset: First byte, counted from the start of the file.
        nbytes: Bytes it fills.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: int
    offset: int
    nbytes: int


class Source(Protocol):
    """A checkpoint that can be read.

    Attributes:
        location: Where it is, for messages.
        revision: Changes when its bytes do.
        tensors: Every stored tensor by name, in execution order.
        tied: Names that share a stored tensor; the first of a group is the stored one.
    """

    location: str
    revision: str
    tensors: dict[str, StoredTensor]
    tied: tuple[tuple[str, ...], ...]

    def small_file(self, name: str) -> bytes | None:
        """Return the content of `config.json` or `generation_config.json`, or None where there is none."""
        ...

    def receive(self) -> None:
        """Bring every byte into memory; blocks.

        Raises:
            LoadFailed: The bytes did not come.
            DoesNotFit: There is not enough memory.
        """
        ...

    def file_count(self) -> int:
        """Return the number of weights files."""
        ...

    def file_data(self, file: int) -> memoryview:
        """Return a whole file's bytes; after `receive` all of them are there."""
        ...

    def data(self, name: str) -> memoryview:
        """Return a tensor's bytes, waiting for them where they are still on their way."""
        ...

    def metadata(self) -> dict[str, str]:
        """Return the free-form metadata of the files' headers; empty where the daemon doesn't tell it."""
        ...

    def bytes_read(self) -> int:
        """Return the bytes this process copied from files; 0 for mapped files and the daemon's pool."""
        ...

    def close(self) -> None:
        """Let go of it; memory that tensors use stays theirs."""
        ...


def open_source(
    path: str | os.PathLike[str],
    *,
    daemon: str | os.PathLike[str] | None,
    rank: int | None = None,
    verify: str = Verify.FIRST,
) -> Source:
    """Return the checkpoint at `path`, from a daemon or from the disk.

    Args:
        path: A folder, a `file://` uri, or another uri that the daemon knows.
        daemon: See `find_socket`.
        rank: Which tensor-parallel rank's file, where the checkpoint is cut; of a folder of this host only.
        verify: When digests are compared where no daemon serves the folder, a value of `Verify`.

    Raises:
        NotFound: There is no such folder.
        InvalidRequest: A rank is asked of what is no folder of this host; no such `verify`.
        CheckpointInvalid: It is damaged.
        PeerError: A daemon is needed, and none answers.
    """
    folder, when = local_folder(path), verify_named(verify)
    if rank is not None and folder is None:
        raise InvalidRequest(
            f"{os.fspath(path)} is no folder of this host, and tensor-parallel ranks are read from one: "
            "fetch it first (`stoker pull`)",
            param="path",
        )
    socket = find_socket(daemon)
    if socket is None:
        if folder is None:
            raise PeerError(
                f"{os.fspath(path)} is no folder of this host: only a store daemon can fetch it; start one "
                "(`stoker up`) and pass daemon=<its attach socket>"
            )
        return _from_disk(folder, rank, when)
    otherwise: Callable[[], LocalSource] | None = None
    if folder is not None and daemon == AUTO:
        otherwise = functools.partial(_from_disk, folder, rank, when)
    try:
        if rank is not None and folder is not None:
            return _rank_from_daemon(socket, open_checkpoint(folder, rank=rank), otherwise)
        uri = os.fspath(path) if folder is None else str(folder.resolve())
        return _from_daemon(socket, uri, otherwise)
    except (PeerError, CapacityError, NotFound, InvalidRequest):
        if otherwise is None:
            raise
        return otherwise()


def local_folder(path: str | os.PathLike[str]) -> Path | None:
    """Return the folder that `path` names, or None when it is the uri of something elsewhere. Pure."""
    text = os.fspath(path)
    if "://" not in text:
        return Path(text).expanduser()
    parts = urlsplit(text)
    if parts.scheme == "file" and parts.netloc in {"", "localhost"}:
        return Path(unquote(parts.path))
    return None


class LocalSource:
    """A folder of this host. Files are mapped when something is asked for, or read whole by `receive`.

    Args:
        index: What it holds.
        verify: When `receive` compares digests; what is mapped when it is asked for is not checked.
    """

    def __init__(self, index: CheckpointIndex, *, verify: Verify = Verify.FIRST) -> None:
        self.index = index
        self._check = FileCheck(verify=verify, chunk_bytes=index.chunk_bytes)
        self.location = str(index.path)
        self.revision = str(index.revision)
        self.tied = index.tied_groups
        numbers = {file.name: number for number, file in enumerate(index.files)}
        by_name = {tensor.name: tensor for tensor in index.tensors}
        self.tensors = {
            placed.name: StoredTensor(
                name=placed.name,
                dtype=by_name[placed.name].dtype,
                shape=by_name[placed.name].shape,
                file=numbers[by_name[placed.name].file],
                offset=by_name[placed.name].offset,
                nbytes=by_name[placed.name].nbytes,
            )
            for placed in execution_order(by_name)
        }
        self._memory: dict[int, FileMemory] = {}

    def small_file(self, name: str) -> bytes | None:
        """See `Source`."""
        path = resolve_file(self.index.path, name)
        return None if path is None else read_bounded(path, limit_bytes=MAX_SMALL_FILE_BYTES)

    def receive(self) -> None:
        """See `Source`."""
        self._memory = dict(enumerate(load_files(self.index.files, check=self._check)))

    def file_count(self) -> int:
        """See `Source`."""
        return len(self.index.files)

    def file_data(self, file: int) -> memoryview:
        """See `Source`."""
        if file not in self._memory:
            self._memory[file] = map_file(self.index.files[file])
        return self._memory[file].data

    def data(self, name: str) -> memoryview:
        """See `Source`."""
        place = self.tensors[name]
        return self.file_data(place.file)[place.offset : place.offset + place.nbytes]

    def metadata(self) -> dict[str, str]:
        """See `Source`."""
        from stoker.checkpoint.index import read_header  # noqa: PLC0415 - only who asks pays

        found: dict[str, str] = {}
        for file in self.index.files:
            found.update(read_header(file.path)[0].metadata)
        return found

    def bytes_read(self) -> int:
        """See `Source`."""
        return sum(memory.bytes_read for memory in self._memory.values())

    def close(self) -> None:
        """See `Source`."""
        self._memory.clear()


class PoolSource:
    """A checkpoint in a store daemon's pool, attached: its memory is this process's, uncopied.

    Args:
        attachment: The checkpoint, or one tensor-parallel rank's file.
        index: Says of a rank how its tensors are cut; None where nothing is cut.
        otherwise: Opens the same checkpoint on this host's disk, for when the daemon goes away before all
            bytes are there; None: that is an error.
    """

    def __init__(
        self,
        attachment: Attachment,
        index: CheckpointIndex | None = None,
        *,
        otherwise: Callable[[], LocalSource] | None = None,
    ) -> None:
        self._attachment = attachment
        self._otherwise = otherwise
        self._local: LocalSource | None = None
        self.index = index
        self.location = attachment.checkpoint.uri
        self.revision = attachment.checkpoint.revision
        self.tied = attachment.tied
        self.tensors = {
            tensor.name: StoredTensor(
                name=tensor.name,
                dtype=tensor.dtype,
                shape=tensor.shape,
                file=tensor.file,
                offset=tensor.offset,
                nbytes=tensor.nbytes,
            )
            for tensor in attachment.tensors.values()
        }

    def small_file(self, name: str) -> bytes | None:
        """See `Source`."""
        return self._attachment.small_files.get(name)

    def receive(self) -> None:
        """See `Source`."""
        try:
            self._attachment.wait_all()
        except LoadFailed as error:
            self._without_daemon(error).receive()
            return
        for file in range(self._attachment.file_count):
            self._attachment.map_pages(file)

    def file_count(self) -> int:
        """See `Source`."""
        return self._attachment.file_count

    def file_data(self, file: int) -> memoryview:
        """See `Source`."""
        return self._attachment.buffer(file) if self._local is None else self._local.file_data(file)

    def data(self, name: str) -> memoryview:
        """See `Source`."""
        if self._local is not None:
            return self._local.data(name)
        place = self.tensors[name]
        try:
            self._attachment.wait_tensor(name)
        except LoadFailed as error:
            return self._without_daemon(error).data(name)
        return self._attachment.buffer(place.file, place.offset, place.nbytes)

    def metadata(self) -> dict[str, str]:
        """See `Source`."""
        return {}

    def bytes_read(self) -> int:
        """See `Source`."""
        return 0 if self._local is None else self._local.bytes_read()

    def close(self) -> None:
        """See `Source`."""
        self._attachment.close()
        if self._local is not None:
            self._local.close()

    def _without_daemon(self, error: LoadFailed) -> LocalSource:
        """Go on with the disk where the daemon has gone away; raises the error where that is not the case."""
        if self._otherwise is None or not isinstance(error.__cause__, PeerError):
            raise error
        local = self._otherwise()
        if local.revision != self.revision:
            raise error
        self._local = local
        return local


def _from_disk(folder: Path, rank: int | None, verify: Verify) -> LocalSource:
    return LocalSource(open_checkpoint(folder, rank=rank), verify=verify)


def _from_daemon(socket: Path, uri: str, otherwise: Callable[[], LocalSource] | None) -> PoolSource:
    from stoker.attach import attach  # noqa: PLC0415 - imports grpc's messages: only who asks pays

    return PoolSource(attach(socket, uri, holder=f"library {os.getpid()}"), otherwise=otherwise)


def _rank_from_daemon(
    socket: Path, index: CheckpointIndex, otherwise: Callable[[], LocalSource] | None
) -> PoolSource:
    from stoker.attach import attach  # noqa: PLC0415 - as above

    holder = f"library {os.getpid()} rank {index.rank}"
    rank = index.rank if index.ranks > 1 else None
    found = attach(socket, str(index.path), revision=index.revision, rank=rank, holder=holder)
    return PoolSource(found, index, otherwise=otherwise)
