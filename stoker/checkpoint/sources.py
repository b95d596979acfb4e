"""Where a conversion reads from: three formats, told apart by the files in the folder.

A source lists its tensors and hands out their bytes in slices, so that memory does not depend on the model.
How far each format keeps that promise is said in its class.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self

from stoker.checkpoint import digests
from stoker.checkpoint.folder import open_regular, read_exactly, resolve_file, resolve_folder
from stoker.checkpoint.index import open_checkpoint
from stoker.checkpoint.layout import MANIFEST_NAME, SHARD_INDEX_NAME, WEIGHTS_NAME
from stoker.checkpoint.plan import PlannedTensor
from stoker.checkpoint.shards import find_shards
from stoker.checkpoint.small_files import find_small_files, read_small_files
from stoker.checkpoint.tensor_source import SLICE_BYTES, TensorSource
from stoker.errors import CheckpointInvalid, InvalidRequest, NotFound
from stoker.units import GIB

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

    from stoker.checkpoint.index import CheckpointIndex

PICKLE_NAME = "pytorch_model.bin"
PICKLE_INDEX_NAME = "pytorch_model.bin.index.json"
MAX_OPEN_FILES = 32
"""Shards held open at once; execution order seldom goes back to an earlier one."""

MAX_FINGERPRINTED_BYTES = GIB
"""Up to this size a source is recognised by its content; a larger one by names, sizes and times."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceFiles:
    """What a source consists of, known before any weight is read.

    Attributes:
        location: The folder, or the GGUF file.
        format: `safetensors`, `pickle` or `gguf`.
        weights: Real paths of the weights files.
        small: Real paths of the small files.
    """

    location: Path
    format: str
    weights: tuple[Path, ...]
    small: tuple[Path, ...]

    def stamp(self) -> str:
        """Return 32 hex digits over names, sizes and times: the same while nobody writes to the source."""
        texts: list[str] = []
        for path in (*self.weights, *self.small):
            status = path.stat()
            texts += [path.name, str(status.st_size), str(status.st_mtime_ns)]
        return digests.digest_of_texts(texts)

    def fingerprint(self) -> str:
        """Return 32 hex digits that tell this source from another one; blocks while it reads.

        By content where all files together have at most `MAX_FINGERPRINTED_BYTES`, else as `stamp`.
        """
        files = (*self.weights, *self.small)
        if sum(path.stat().st_size for path in files) > MAX_FINGERPRINTED_BYTES:
            return self.stamp()
        return digests.digest_of_texts(text for path in files for text in (path.name, _content_digest(path)))


def find_source(src: str | os.PathLike[str]) -> SourceFiles:
    """Return what the checkpoint at `src`, a folder or a `.gguf` file, consists of.

    Raises:
        NotFound: There is nothing at `src`.
        InvalidRequest: It is a file of another kind, or a folder with several GGUF files.
        CheckpointInvalid: The folder holds no checkpoint, or files are missing.
    """
    path = Path(src).expanduser()
    if path.is_file():
        if path.suffix.lower() != ".gguf":
            raise InvalidRequest(f"{path} is a file; give the folder of the checkpoint, or a .gguf file.")
        return SourceFiles(location=path, format="gguf", weights=(path.resolve(),), small=())
    folder = resolve_folder(path)
    small = tuple(find_small_files(folder).values())
    if any(resolve_file(folder, name) for name in (MANIFEST_NAME, WEIGHTS_NAME, SHARD_INDEX_NAME)):
        weights = _safetensors_files(folder)
        return SourceFiles(location=folder, format="safetensors", weights=weights, small=small)
    pickles = find_shards(
        folder, single_name=PICKLE_NAME, index_name=PICKLE_INDEX_NAME, suffix=".bin", required=False
    )
    if pickles.paths:
        weights = tuple(pickles.paths.values())
        return SourceFiles(location=folder, format="pickle", weights=weights, small=small)
    ggufs = sorted(entry for entry in folder.iterdir() if entry.suffix.lower() == ".gguf")
    if len(ggufs) > 1:
        names = ", ".join(entry.name for entry in ggufs[:10])
        raise InvalidRequest(f"{folder} holds {len(ggufs)} GGUF files ({names}); give the one to convert.")
    if ggufs:
        return find_source(ggufs[0])
    raise CheckpointInvalid(
        f"{folder} holds no checkpoint: none of {WEIGHTS_NAME}, {SHARD_INDEX_NAME}, {PICKLE_NAME}, "
        f"{PICKLE_INDEX_NAME}, *.gguf. Give the folder that holds the weights."
    )


def open_source(files: SourceFiles, *, dtype: str | None) -> TensorSource:
    """Open the source for reading.

    Args:
        files: What `find_source` returned.
        dtype: What floating tensors will be cast to (a key of `CASTABLE`), or None; a format that has to
            compute its tensors computes them in it.

    Raises:
        CheckpointInvalid: The source is damaged, or of a kind that cannot be read.
        InvalidRequest: The extra that reads this format is not installed.
    """
    if files.format == "safetensors":
        return SafetensorsSource(files.location)
    try:
        if files.format == "pickle":
            from stoker.checkpoint.pickle_source import PickleSource  # noqa: PLC0415 - imports torch

            return PickleSource(files.location, files.weights)
        from stoker.checkpoint.gguf_source import GgufSource  # noqa: PLC0415 - imports transformers

        return GgufSource(files.location, dtype=dtype)
    except ImportError as error:
        raise InvalidRequest(
            f"Converting {files.format} needs a package that is not installed ({error.name}): "
            "install stoker[convert]."
        ) from error


class SafetensorsSource(TensorSource):
    """Safetensors, in one file or many. Memory: one slice, whatever the model's size."""

    def __init__(self, folder: Path) -> None:
        self._index: CheckpointIndex = open_checkpoint(folder)
        self._paths = {file.name: file.path for file in self._index.files}
        self._records = {tensor.name: tensor for tensor in self._index.tensors}
        self._open: OrderedDict[str, int] = OrderedDict()
        self._buffer = bytearray(SLICE_BYTES)
        self.tensors = {
            tensor.name: PlannedTensor(
                name=tensor.name, dtype=tensor.dtype, shape=tensor.shape, nbytes=tensor.nbytes
            )
            for tensor in self._index.tensors
        }
        self.tied_groups = self._index.tied_groups
        self.shared_groups: tuple[tuple[str, ...], ...] = ()

    def read(self, name: str) -> Iterator[memoryview]:
        """Yield the tensor's bytes from the disk; the buffer is reused."""
        record = self._records[name]
        view = memoryview(self._buffer)
        for begin in range(0, record.nbytes, SLICE_BYTES):
            part = view[: min(SLICE_BYTES, record.nbytes - begin)]
            descriptor = self._descriptor(record.file)
            read_exactly(descriptor, part, record.offset + begin, where=str(self._paths[record.file]))
            yield part

    def small_files(self) -> dict[str, bytes]:
        """Return the folder's small files."""
        return read_small_files(self._index.path)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None:
        while self._open:
            os.close(self._open.popitem()[1])

    def __enter__(self) -> Self:
        return self

    def _descriptor(self, file: str) -> int:
        if file not in self._open:
            if len(self._open) >= MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
            self._open[file] = open_regular(self._paths[file])
        self._open.move_to_end(file)
        return self._open[file]


def _safetensors_files(folder: Path) -> tuple[Path, ...]:
    return tuple(file.path for file in open_checkpoint(folder).files)


def _content_digest(path: Path) -> str:
    state = digests.Digest()
    buffer = memoryview(bytearray(SLICE_BYTES))
    try:
        with path.open("rb", buffering=0) as file:
            while count := file.readinto(buffer):
                state.update(buffer[:count])
    except FileNotFoundError as error:
        raise NotFound(f"{path} vanished while it was read.") from error
    return state.hex()
