"""What is fuzzed: every reader of a checkpoint's files that may come from somebody hostile.

A target takes the bytes of one file. It may refuse them with `CheckpointInvalid`, or accept them; what it
accepts must hold what the readers promise to everyone behind them. Anything else is a finding.
"""

from __future__ import annotations

import json
import shutil
import struct
import tempfile
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from stoker.checkpoint import digests, manifest
from stoker.checkpoint.dtypes import tensor_bytes
from stoker.checkpoint.index import CheckpointIndex, open_checkpoint
from stoker.checkpoint.layout import CONFIG_NAME, MANIFEST_NAME, SHARD_INDEX_NAME, WEIGHTS_NAME, is_padding
from stoker.checkpoint.manifest import Manifest, SmallFile, Source, TensorRecord, WeightsFile
from stoker.checkpoint.safetensors_header import header_length, parse_header
from stoker.checkpoint.shards import find_shards
from stoker.errors import CheckpointInvalid
from tests.fuzz.mutations import repaired_length

_CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 2}).encode()
_SHAPES: Mapping[str, tuple[str, tuple[int, ...]]] = {
    "model.embed_tokens.weight": ("BF16", (8, 4)),
    "model.layers.0.self_attn.q_proj.weight": ("F32", (4, 4)),
    "model.layers.1.mlp.up_proj.weight": ("F8_E4M3", (3,)),
    "model.layers.1.mlp.scale": ("F64", ()),
    "model.norm.weight": ("BOOL", (0, 5)),
    "lm_head.weight": ("I8", (7,)),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """One reader under test.

    Attributes:
        name: As chosen on the command line.
        seeds: Files that it accepts.
        accepts: Reads a file; True = accepted, False = refused with the error meant for that.
        repaired: Makes an input agree with itself again, so that it gets past the first check.
    """

    name: str
    seeds: tuple[bytes, ...]
    accepts: Callable[[bytes], bool]
    repaired: Callable[[bytes], bytes] = bytes


def targets() -> list[Target]:
    """Return every target; folders are made below the system's folder for temporary files."""
    folders = {name: _Folder(name) for name in (SHARD_INDEX_NAME, WEIGHTS_NAME, MANIFEST_NAME, CONFIG_NAME)}
    weights, described = (_weights(), _weights(pad=True)), (_manifest(),)
    return [
        Target(name="header", seeds=weights, accepts=_accepts_header, repaired=repaired_length),
        Target(name="manifest", seeds=described, accepts=_accepts_manifest, repaired=_repaired_revision),
        Target(name="shard_index", seeds=(_shard_index(),), accepts=folders[SHARD_INDEX_NAME].accepts),
        Target(
            name="in_place", seeds=weights, accepts=folders[WEIGHTS_NAME].accepts, repaired=repaired_length
        ),
        Target(
            name="converted",
            seeds=described,
            accepts=folders[MANIFEST_NAME].accepts,
            repaired=_repaired_revision,
        ),
        Target(name="config", seeds=(_CONFIG,), accepts=folders[CONFIG_NAME].accepts),
    ]


def _repaired_revision(text: bytes) -> bytes:
    """Return a manifest whose revision is that of its content, where it has one."""
    try:
        document = json.loads(text)
        document["revision"] = manifest.content_revision(
            files=tuple(
                WeightsFile(**{**file, "chunk_digests": tuple(file["chunk_digests"])})
                for file in document["files"]
            ),
            small_files=tuple(SmallFile(**small) for small in document["small_files"]),
            tied_groups=tuple(tuple(group) for group in document["tied_groups"]),
            chunk_bytes=document["chunk_bytes"],
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return text
    return json.dumps(document).encode()


def _accepts_header(file: bytes) -> bool:
    try:
        length = header_length(file[:8], file_bytes=len(file), where="f")
        header = parse_header(file[8 : 8 + length], file_bytes=len(file), where="f")
    except CheckpointInvalid:
        return False
    position = header.data_start
    for entry in header.tensors:
        assert header.data_start + entry.begin == position, "a hole or an overlap was accepted"
        assert tensor_bytes(entry.dtype, entry.shape) == entry.nbytes, "bytes that do not fit the shape"
        position += entry.nbytes
    assert position == len(file), "bytes that no tensor owns were accepted"
    _check_library_agrees(file)
    return True


def _check_library_agrees(file: bytes) -> None:
    """The safetensors library must accept what we accept."""
    from safetensors import SafetensorError, deserialize

    try:
        deserialize(file)
    except SafetensorError as error:
        raise AssertionError(f"safetensors refuses what was accepted: {error}") from error


def _accepts_manifest(text: bytes) -> bool:
    try:
        found = manifest.parse(text, where="f")
    except CheckpointInvalid:
        return False
    sizes = {file.name: file.size_bytes for file in found.files}
    for tensor in found.tensors:
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= sizes[tensor.file], "out of its file"
    for file in found.files:
        assert "/" not in file.name, "a path was accepted"
        assert file.name not in {".", ".."}, "a path was accepted"
    assert manifest.parse(manifest.render(found), where="f") == found, "it does not survive being written"
    return True


class _Folder:
    """A checkpoint folder of which one file is replaced by the input."""

    def __init__(self, replaced: str) -> None:
        memory = Path("/dev/shm")
        self._folder = Path(tempfile.mkdtemp(prefix="stoker-fuzz-", dir=memory if memory.is_dir() else None))
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)  # also when the process ends
        self._replaced = replaced
        (self._folder / "config.json").write_bytes(_CONFIG)
        if replaced == SHARD_INDEX_NAME:
            for name, content in _shards().items():
                (self._folder / name).write_bytes(content)
        else:
            (self._folder / WEIGHTS_NAME).write_bytes(_weights())

    def accepts(self, content: bytes) -> bool:
        """Open the folder with `content` in place of the file."""
        (self._folder / self._replaced).write_bytes(content)
        try:
            if self._replaced == SHARD_INDEX_NAME:
                for path in find_shards(self._folder).paths.values():
                    assert path.parent == self._folder.resolve(), "a shard outside of the folder"
            index = open_checkpoint(self._folder)
        except CheckpointInvalid:
            return False
        _check_index(index)
        return True


def _check_index(index: CheckpointIndex) -> None:
    sizes = {file.name: file.size_bytes for file in index.files}
    for tensor in index.tensors:
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= sizes[tensor.file], "out of its file"
        assert not is_padding(tensor.name), "filler was taken for a tensor"


# --- sound files ---


def _weights(names: tuple[str, ...] = tuple(_SHAPES), *, pad: bool = False) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}} if pad else {}
    position = 0
    for name in names:
        dtype, shape = _SHAPES[name]
        nbytes = tensor_bytes(dtype, shape)
        assert nbytes is not None
        table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, position + nbytes]}
        position += nbytes
    header = json.dumps(table).encode()
    header += b" " * (-len(header) % 8) if pad else b""
    return struct.pack("<Q", len(header)) + header + bytes(index % 2 for index in range(position))


def _shards() -> dict[str, bytes]:
    names = tuple(_SHAPES)
    return {
        "model-00001-of-00002.safetensors": _weights(names[:3]),
        "model-00002-of-00002.safetensors": _weights(names[3:]),
    }


def _shard_index() -> bytes:
    names = tuple(_SHAPES)
    first, second = _shards()
    listed = {name: first if number < 3 else second for number, name in enumerate(names)}
    return json.dumps({"metadata": {"total_size": 1}, "weight_map": listed}).encode()


def _manifest() -> bytes:
    file = _weights()
    (length,) = struct.unpack("<Q", file[:8])
    header = parse_header(file[8 : 8 + length], file_bytes=len(file), where="f")
    files = (
        WeightsFile(
            name=WEIGHTS_NAME,
            size_bytes=len(file),
            chunk_digests=tuple(digests.digest(file[at : at + 4096]) for at in range(0, len(file), 4096)),
        ),
    )
    small = (SmallFile(name="config.json", size_bytes=len(_CONFIG), digest=digests.digest(_CONFIG)),)
    tied = (("model.embed_tokens.weight", "tied.weight"),)
    return manifest.render(
        Manifest(
            revision=manifest.content_revision(
                files=files, small_files=small, tied_groups=tied, chunk_bytes=4096
            ),
            chunk_bytes=4096,
            files=files,
            tensors=tuple(
                TensorRecord(
                    name=entry.name,
                    dtype=entry.dtype,
                    shape=entry.shape,
                    file=WEIGHTS_NAME,
                    offset=header.data_start + entry.begin,
                    nbytes=entry.nbytes,
                    layer=None,
                )
                for entry in header.tensors
            ),
            tied_groups=tied,
            small_files=small,
            source=Source(uri="/m", format="safetensors", fingerprint="0" * 32, dtype=None),
        )
    )
