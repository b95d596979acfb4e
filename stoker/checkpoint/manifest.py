"""`stoker.json`: what a converted checkpoint holds. Pure: values to JSON text and back, strictly.

Rules a manifest keeps, checked on every read: the tensors of a file lie inside it and do not overlap; every
file has one digest per chunk; tied groups name the one stored tensor first; the revision is the digest of the
content it lists, so a manifest that was edited by hand is refused.
"""

from __future__ import annotations

import json
import re
from dataclasses import asdict, dataclass
from typing import Any

from stoker.checkpoint import digests, hostile_json
from stoker.checkpoint.dtypes import DTYPE_BITS, tensor_bytes
from stoker.checkpoint.layout import LAYOUT_VERSION, chunk_count, is_padding
from stoker.checkpoint.safetensors_header import check_name
from stoker.errors import CheckpointInvalid
from stoker.ids import Revision
from stoker.units import GIB, KIB

MAX_MANIFEST_BYTES = 256 * 1024 * KIB
_WEIGHT_FILE = re.compile(r"model\.safetensors|rank-\d{1,5}-of-\d{1,5}\.safetensors")
_SMALL_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,200}")
MAX_RANKS = 1024
_CONVERT_AGAIN = "convert the checkpoint again."


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorRecord:
    """Where one tensor lies, in a converted checkpoint or in place.

    Attributes:
        name: As the model calls it.
        dtype: A key of `DTYPE_BITS`.
        shape: Element counts; `()` for a scalar.
        file: Name of the weights file.
        offset: First byte, counted from the start of that file.
        nbytes: Bytes that the tensor fills.
        layer: Index of the decoder layer that uses it; None for embedding, norm, head and what has none.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int
    layer: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightsFile:
    """One file of tensors: `model.safetensors`, or one rank's.

    Attributes:
        name: File name inside the folder.
        size_bytes: Whole size, header included.
        chunk_digests: One digest per chunk, counted from the file's first byte.
    """

    name: str
    size_bytes: int
    chunk_digests: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class SmallFile:
    """A file that is copied verbatim: configuration, tokenizer, chat template."""

    name: str
    size_bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What a checkpoint was converted from, so that nothing is converted twice.

    Attributes:
        uri: Where it was, for people.
        format: `safetensors`, `pickle` or `gguf`.
        fingerprint: Changes when the source does; 32 hex digits.
        dtype: What its floating tensors were cast to; None when they were kept.
    """

    uri: str
    format: str
    fingerprint: str
    dtype: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorCut:
    """How a tensor was cut for the ranks; see `cuts.Cut`."""

    name: str
    dim: int
    blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """The content of `stoker.json`.

    A checkpoint that is cut for tensor-parallel ranks lists each tensor once per rank, as that rank holds it;
    the last two attributes stand in the file only then.

    Attributes:
        revision: Digest over the content: files, small files, tied groups.
        chunk_bytes: What one chunk digest covers.
        files: Weights files, by rank.
        tensors: By file and offset, which is execution order; filler is not listed.
        tied_groups: Names that share one stored tensor; the first is the stored one.
        small_files: By name.
        source: What it was made from.
        ranks: Tensor-parallel ranks; each has one of the files, in their order.
        cuts: The tensors that are cut; every rank holds the others whole.
    """

    revision: Revision
    chunk_bytes: int
    files: tuple[WeightsFile, ...]
    tensors: tuple[TensorRecord, ...]
    tied_groups: tuple[tuple[str, ...], ...]
    small_files: tuple[SmallFile, ...]
    source: Source
    ranks: int = 1
    cuts: tuple[TensorCut, ...] = ()


def content_revision(
    *,
    files: tuple[WeightsFile, ...],
    small_files: tuple[SmallFile, ...],
    tied_groups: tuple[tuple[str, ...], ...],
    chunk_bytes: int,
    cuts: tuple[TensorCut, ...] = (),
) -> Revision:
    """Return 32 hex digits that change when any byte of the checkpoint's files does."""
    texts = [str(LAYOUT_VERSION), str(chunk_bytes)]
    for file in files:
        texts += ["file", file.name, str(file.size_bytes), *file.chunk_digests]
    for small in small_files:
        texts += ["small", small.name, str(small.size_bytes), small.digest]
    for group in tied_groups:
        texts += ["tied", *group]
    for cut in cuts:
        texts += ["cut", cut.name, str(cut.dim), str(cut.blocks)]
    return Revision(digests.digest_of_texts(texts))


def render(manifest: Manifest) -> bytes:
    """Return the JSON text of `manifest`."""
    value = {"layout_version": LAYOUT_VERSION, **asdict(manifest)}
    if manifest.ranks == 1:
        del value["ranks"], value["cuts"]
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n"


def parse(text: bytes, *, where: str) -> Manifest:
    """Check and return the manifest that `text` holds.

    Raises:
        CheckpointInvalid: Says what is wrong and what to do; also for another layout version.
    """
    value = hostile_json.parse_object(text, where=where)
    version = value.pop("layout_version", None)
    if version != LAYOUT_VERSION or isinstance(version, bool):
        raise CheckpointInvalid(
            f"{where}: layout version {str(version)[:40]}, this program reads {LAYOUT_VERSION}; "
            f"{_CONVERT_AGAIN}"
        )
    value = {"ranks": 1, "cuts": [], **value}
    fields = hostile_json.require_fields(value, _MANIFEST_FIELDS, where=where, field="stoker.json")
    chunk_bytes = hostile_json.require_int(
        fields["chunk_bytes"], where=where, field="chunk_bytes", low=4 * KIB, high=GIB
    )
    files = tuple(_file(item, chunk_bytes, where) for item in _items(fields, "files", where))
    manifest = Manifest(
        revision=Revision(hostile_json.require_str(fields["revision"], where=where, field="revision")),
        chunk_bytes=chunk_bytes,
        files=files,
        tensors=tuple(_tensor(item, where) for item in _items(fields, "tensors", where)),
        tied_groups=tuple(_group(item, where) for item in _items(fields, "tied_groups", where)),
        small_files=tuple(_small(item, where) for item in _items(fields, "small_files", where)),
        source=_source(fields["source"], where),
        ranks=hostile_json.require_int(fields["ranks"], where=where, field="ranks", low=1, high=MAX_RANKS),
        cuts=tuple(_cut(item, where) for item in _items(fields, "cuts", where)),
    )
    _check(manifest, where)
    return manifest


_MANIFEST_FIELDS = frozenset(
    {"revision", "chunk_bytes", "files", "tensors", "tied_groups", "small_files", "source", "ranks", "cuts"}
)
_FILE_FIELDS = frozenset({"name", "size_bytes", "chunk_digests"})
_TENSOR_FIELDS = frozenset({"name", "dtype", "shape", "file", "offset", "nbytes", "layer"})
_CUT_FIELDS = frozenset({"name", "dim", "blocks"})
_SMALL_FIELDS = frozenset({"name", "size_bytes", "digest"})
_SOURCE_FIELDS = frozenset({"uri", "format", "fingerprint", "dtype"})


def _items(fields: dict[str, Any], field: str, where: str) -> list[Any]:
    return hostile_json.require_list(fields[field], where=where, field=field)


def _digest(value: object, where: str) -> str:
    text = hostile_json.require_str(value, where=where, field="digest")
    if not digests.is_digest(text):
        raise CheckpointInvalid(
            f"{where}: {text[:60]!r} is not a digest this program can check; {_CONVERT_AGAIN}"
        )
    return text


def _file(value: object, chunk_bytes: int, where: str) -> WeightsFile:
    fields = hostile_json.require_fields(value, _FILE_FIELDS, where=where, field="files")
    name = hostile_json.require_str(fields["name"], where=where, field="files.name")
    if not _WEIGHT_FILE.fullmatch(name):
        raise CheckpointInvalid(
            f"{where}: {name[:100]!r} is not the name of a weights file; {_CONVERT_AGAIN}"
        )
    size_bytes = hostile_json.require_int(fields["size_bytes"], where=where, field=f"{name}.size_bytes")
    found = tuple(_digest(item, where) for item in _items(fields, "chunk_digests", where))
    if len(found) != chunk_count(size_bytes, chunk_bytes):
        raise CheckpointInvalid(
            f"{where}: {name} has {len(found)} digests for {chunk_count(size_bytes, chunk_bytes)} chunks; "
            f"{_CONVERT_AGAIN}"
        )
    return WeightsFile(name=name, size_bytes=size_bytes, chunk_digests=found)


def _tensor(value: object, where: str) -> TensorRecord:
    fields = hostile_json.require_fields(value, _TENSOR_FIELDS, where=where, field="tensors")
    name = check_name(hostile_json.require_str(fields["name"], where=where, field="name"), where=where)
    dtype = hostile_json.require_str(fields["dtype"], where=where, field=f"{name}.dtype")
    shape = tuple(
        hostile_json.require_int(extent, where=where, field=f"{name}.shape")
        for extent in _items(fields, "shape", where)
    )
    nbytes = hostile_json.require_int(fields["nbytes"], where=where, field=f"{name}.nbytes")
    if dtype not in DTYPE_BITS or tensor_bytes(dtype, shape) != nbytes or is_padding(name):
        raise CheckpointInvalid(
            f"{where}: tensor {name!r}: {nbytes:,} bytes do not hold {dtype[:40]} {list(shape)[:32]}; "
            f"{_CONVERT_AGAIN}"
        )
    layer = fields["layer"]
    return TensorRecord(
        name=name,
        dtype=dtype,
        shape=shape,
        file=hostile_json.require_str(fields["file"], where=where, field=f"{name}.file"),
        offset=hostile_json.require_int(fields["offset"], where=where, field=f"{name}.offset"),
        nbytes=nbytes,
        layer=None if layer is None else hostile_json.require_int(layer, where=where, field=f"{name}.layer"),
    )


def _cut(value: object, where: str) -> TensorCut:
    fields = hostile_json.require_fields(value, _CUT_FIELDS, where=where, field="cuts")
    name = hostile_json.require_str(fields["name"], where=where, field="cuts.name")
    return TensorCut(
        name=name,
        dim=hostile_json.require_int(fields["dim"], where=where, field=f"{name}.dim", high=31),
        blocks=hostile_json.require_int(
            fields["blocks"], where=where, field=f"{name}.blocks", low=1, high=64
        ),
    )


def _group(value: object, where: str) -> tuple[str, ...]:
    names = hostile_json.require_list(value, where=where, field="tied_groups")
    return tuple(hostile_json.require_str(name, where=where, field="tied_groups") for name in names)


def _small(value: object, where: str) -> SmallFile:
    fields = hostile_json.require_fields(value, _SMALL_FIELDS, where=where, field="small_files")
    name = hostile_json.require_str(fields["name"], where=where, field="small_files.name")
    if not _SMALL_FILE.fullmatch(name):
        raise CheckpointInvalid(
            f"{where}: {name[:100]!r} is not a file name this program writes; {_CONVERT_AGAIN}"
        )
    return SmallFile(
        name=name,
        size_bytes=hostile_json.require_int(fields["size_bytes"], where=where, field=f"{name}.size_bytes"),
        digest=_digest(fields["digest"], where),
    )


def _source(value: object, where: str) -> Source:
    fields = hostile_json.require_fields(value, _SOURCE_FIELDS, where=where, field="source")
    dtype = fields["dtype"]
    return Source(
        uri=hostile_json.require_str(fields["uri"], where=where, field="source.uri"),
        format=hostile_json.require_str(fields["format"], where=where, field="source.format"),
        fingerprint=hostile_json.require_str(fields["fingerprint"], where=where, field="source.fingerprint"),
        dtype=None if dtype is None else hostile_json.require_str(dtype, where=where, field="source.dtype"),
    )


def _check(manifest: Manifest, where: str) -> None:
    """Check what no single field shows."""
    sizes = {file.name: file.size_bytes for file in manifest.files}
    if len(sizes) != len(manifest.files) or not sizes:
        raise CheckpointInvalid(f"{where}: no weights file, or one listed twice; {_CONVERT_AGAIN}")
    ends = dict.fromkeys(sizes, 0)
    if manifest.ranks not in {1, len(sizes)}:
        raise CheckpointInvalid(f"{where}: {len(sizes)} files for {manifest.ranks} ranks; {_CONVERT_AGAIN}")
    seen: set[tuple[str, str]] = set()
    for tensor in sorted(manifest.tensors, key=lambda tensor: (tensor.file, tensor.offset, tensor.nbytes)):
        end = tensor.offset + tensor.nbytes
        key = (tensor.file if manifest.ranks > 1 else "", tensor.name)
        if key in seen or tensor.offset < ends.get(tensor.file, end + 1) or end > sizes[tensor.file]:
            raise CheckpointInvalid(
                f"{where}: tensor {tensor.name!r} is listed twice, overlaps another one, or lies outside "
                f"{tensor.file[:100]!r}; {_CONVERT_AGAIN}"
            )
        ends[tensor.file] = end
        seen.add(key)
    names = {name for _, name in seen}
    if len(seen) != len(names) * (max(1, manifest.ranks)):
        raise CheckpointInvalid(f"{where}: a rank lacks a tensor that others have; {_CONVERT_AGAIN}")
    if not names.issuperset(cut.name for cut in manifest.cuts):
        raise CheckpointInvalid(f"{where}: a tensor is cut that is not there; {_CONVERT_AGAIN}")
    for group in manifest.tied_groups:
        if len(group) < 2 or group[0] not in names or names.intersection(group[1:]):  # noqa: PLR2004 - a pair
            raise CheckpointInvalid(
                f"{where}: a tied group must name one stored tensor first; {_CONVERT_AGAIN}"
            )
    expected = content_revision(
        files=manifest.files,
        small_files=manifest.small_files,
        tied_groups=manifest.tied_groups,
        chunk_bytes=manifest.chunk_bytes,
        cuts=manifest.cuts,
    )
    if manifest.revision != expected:
        raise CheckpointInvalid(
            f"{where}: the revision does not match the digests: the file was changed; {_CONVERT_AGAIN}"
        )
