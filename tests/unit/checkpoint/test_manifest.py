"""Claims about `stoker.json`."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.checkpoint import manifest
from stoker.checkpoint.digests import digest
from stoker.errors import CheckpointInvalid
from stoker.units import MIB

FILES = (
    manifest.WeightsFile(
        name="model.safetensors", size_bytes=17 * MIB, chunk_digests=(digest(b"1"), digest(b"2"))
    ),
)
SMALL = (manifest.SmallFile(name="config.json", size_bytes=2, digest=digest(b"{}")),)
TIED = (("a.weight", "b.weight"),)
GOOD = manifest.Manifest(
    revision=manifest.content_revision(
        files=FILES, small_files=SMALL, tied_groups=TIED, chunk_bytes=16 * MIB
    ),
    chunk_bytes=16 * MIB,
    files=FILES,
    tensors=(
        manifest.TensorRecord(
            name="a.weight",
            dtype="F32",
            shape=(2, 3),
            file="model.safetensors",
            offset=4096,
            nbytes=24,
            layer=None,
        ),
        manifest.TensorRecord(
            name="layers.0.x",
            dtype="BF16",
            shape=(),
            file="model.safetensors",
            offset=4352,
            nbytes=2,
            layer=0,
        ),
    ),
    tied_groups=TIED,
    small_files=SMALL,
    source=manifest.Source(uri="/models/é", format="safetensors", fingerprint="0" * 32, dtype=None),
)


def changed(change: str, value: Any) -> bytes:
    """Return the good manifest's text with the field at a dotted path replaced."""
    document = json.loads(manifest.render(GOOD))
    *path, last = change.split(".")
    target: Any = document
    for step in path:
        target = target[int(step)] if isinstance(target, list) else target[step]
    target[int(last) if isinstance(target, list) else last] = value
    return json.dumps(document).encode()


def test_what_is_written_is_read_back_equal() -> None:
    assert manifest.parse(manifest.render(GOOD), where="x") == GOOD


@pytest.mark.parametrize(
    ("change", "value"),
    [
        ("layout_version", 2),
        ("layout_version", True),
        ("extra", 1),
        ("revision", "0" * 32),
        ("chunk_bytes", 0),
        ("chunk_bytes", 2**40),
        ("chunk_bytes", 8 * MIB),
        ("files", []),
        ("files.0.name", "../model.safetensors"),
        ("files.0.name", "/etc/passwd"),
        ("files.0.size_bytes", 33 * MIB),
        ("files.0.size_bytes", -1),
        ("files.0.chunk_digests.0", "md5:00"),
        ("files.0.chunk_digests.0", digest(b"other")),
        ("tensors.0.file", "other.safetensors"),
        ("tensors.0.offset", 17 * MIB),
        ("tensors.0.offset", 4340),
        ("tensors.0.nbytes", 25),
        ("tensors.0.dtype", "F31"),
        ("tensors.0.name", "layers.0.x"),
        ("tensors.0.name", "__stoker_pad__.0"),
        ("tensors.0.name", "../a"),
        ("tensors.0.shape", [2**62, 2**62]),
        ("tensors.1.layer", -1),
        ("tied_groups.0", ["a.weight"]),
        ("tied_groups.0", ["b.weight", "a.weight"]),
        ("small_files.0.name", "../config.json"),
        ("small_files.0.digest", None),
        ("source", None),
    ],
)
def test_a_manifest_that_breaks_a_rule_is_refused(change: str, value: Any) -> None:
    with pytest.raises(CheckpointInvalid, match=r"^here"):
        manifest.parse(changed(change, value), where="here")


@settings(max_examples=200, deadline=None)
@given(place=st.integers(0, 700), byte=st.integers(0, 255))
def test_a_damaged_manifest_is_refused_or_still_consistent(place: int, byte: int) -> None:
    text = bytearray(manifest.render(GOOD))
    text[place % len(text)] = byte

    try:
        found = manifest.parse(bytes(text), where="x")
    except CheckpointInvalid:
        return

    assert found.revision == GOOD.revision
    assert found.files == GOOD.files
