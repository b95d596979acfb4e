"""`stoker-origin.json`: where a cached checkpoint came from. Pure: values to JSON text and back, strictly."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from services.store.origins.origin import RemoteFile
from stoker.checkpoint import hostile_json
from stoker.checkpoint.digests import digest_of_texts

RECORD_NAME = "stoker-origin.json"
MAX_RECORD_BYTES = 16 * 1024 * 1024
_VERSION = 1
_FIELDS = frozenset({"version", "uri", "revision", "files"})
_FILE_FIELDS = frozenset({"name", "size_bytes", "version"})
_DAY_SECONDS = 86_400


@dataclass(frozen=True, slots=True, kw_only=True)
class OriginRecord:
    """Where a checkpoint came from.

    Attributes:
        uri: Of its folder.
        revision: Of the checkpoint.
        files: All its files as they were at the origin, by name.
    """

    uri: str
    revision: str
    files: Mapping[str, RemoteFile]


def render(record: OriginRecord) -> bytes:
    """Return the JSON text of a record."""
    files = [asdict(file) for file in record.files.values()]
    value = {"version": _VERSION, "uri": record.uri, "revision": record.revision, "files": files}
    return json.dumps(value, ensure_ascii=False).encode() + b"\n"


def parse(text: bytes, *, where: str) -> OriginRecord:
    """Return the record that `text` holds.

    Raises:
        CheckpointInvalid: It is damaged, or of another version.
    """
    value = hostile_json.parse_object(text, where=where)
    fields = hostile_json.require_fields(value, _FIELDS, where=where, field=RECORD_NAME)
    hostile_json.require_int(fields["version"], where=where, field="version", low=_VERSION, high=_VERSION)
    files = {}
    for item in hostile_json.require_list(fields["files"], where=where, field="files"):
        of_file = hostile_json.require_fields(item, _FILE_FIELDS, where=where, field="files")
        name = hostile_json.require_str(of_file["name"], where=where, field="name")
        files[name] = RemoteFile(
            name=name,
            size_bytes=hostile_json.require_int(of_file["size_bytes"], where=where, field="size_bytes"),
            version=hostile_json.require_str(of_file["version"], where=where, field="version"),
        )
    return OriginRecord(
        uri=hostile_json.require_str(fields["uri"], where=where, field="uri"),
        revision=hostile_json.require_str(fields["revision"], where=where, field="revision"),
        files=files,
    )


def modified_ns(file: RemoteFile) -> int:
    """Return the modification time that a file's copy gets on every host: made from its version.

    A revision in place is made from sizes and times, among others; with this, it changes exactly when the
    origin's version does, and hosts agree on it.
    """
    seed = int(digest_of_texts([file.name, str(file.size_bytes), file.version])[:15], 16)
    return (_DAY_SECONDS + seed % 1_000_000_000) * 1_000_000_000


def folder_name(uri: str, revision: str) -> str:
    """Return the name of a checkpoint's folder in the cache."""
    return f"{digest_of_texts([uri])[:16]}-{digest_of_texts([revision])[:16]}"
