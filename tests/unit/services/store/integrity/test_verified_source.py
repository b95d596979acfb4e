"""A file whose bytes are wrong is never handed out; how often it is looked at is the policy's."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from services.store.integrity.damaged_copies import MAX_KEPT, DamagedCopies
from services.store.integrity.digests import ChunkDamaged, FileDigests
from services.store.integrity.verified_parts import VerifiedParts, copy_key
from services.store.integrity.verified_source import VerifiedSource
from services.store.settings import VerifyDisk
from stoker.checkpoint.digests import digest
from stoker.checkpoint.reading import FileSignature, SourceFile
from stoker.errors import LoadFailed

PART = 4096
CHUNK = 2 * PART


class Disk:
    """A file of a few parts, and what a daemon remembers of it."""

    def __init__(self, folder, *, size: int = 5 * PART + 77) -> None:
        self.path = folder / "model.safetensors"
        self.content = os.urandom(size)
        self.path.write_bytes(self.content)
        self.digests = FileDigests(
            size_bytes=size,
            part_bytes=PART,
            texts=tuple(digest(self.content[at : at + PART]) for at in range(0, size, PART)),
        )
        self.parts = VerifiedParts(None)
        self.checkers = ThreadPoolExecutor(max_workers=1)
        self.cache = None
        self.forgotten: list[object] = []

    def flip(self, at: int, *, keep_time: bool = True) -> None:
        """Damage a byte as a disk does: nothing tells of it."""
        status = self.path.stat()
        with self.path.open("r+b") as file:
            file.seek(at)
            file.write(bytes([self.content[at] ^ 4]))
        if keep_time:
            os.utime(self.path, ns=(status.st_atime_ns, status.st_mtime_ns))

    def source(self, policy: VerifyDisk) -> VerifiedSource:
        """Open it as a load does."""
        signature = FileSignature.of(self.path.stat())
        copies = DamagedCopies(self.cache, lambda *what: self.forgotten.append(what))
        return VerifiedSource(
            SourceFile(self.path, signature),
            self.path,
            self.digests,
            signature=signature,
            policy=policy,
            parts=self.parts,
            report=copies.found,
            checkers=self.checkers,
        )

    def load(self, policy: VerifyDisk = VerifyDisk.FIRST) -> bytes:
        """Read the whole file as a load does."""
        source = self.source(policy)
        found = b""
        try:
            for at in range(0, len(self.content), CHUNK):
                memory = bytearray(CHUNK)
                length = min(CHUNK, len(self.content) - at)
                source.read(memoryview(memory), offset=at, length=length)
                found += memory[:length]
        finally:
            source.close()
        return found


def test_sound_bytes_are_handed_out(tmp_path):
    disk = Disk(tmp_path)

    assert disk.load() == disk.content


def test_a_flipped_bit_fails_the_load_and_says_what_to_run(tmp_path):
    disk = Disk(tmp_path)
    disk.flip(3 * PART + 5)

    with pytest.raises(ChunkDamaged, match=f"between bytes 12,288 and 16,384.*stoker verify {tmp_path}"):
        disk.load()


def test_first_checks_again_when_the_file_was_written_to(tmp_path):
    disk = Disk(tmp_path)
    disk.load()
    disk.flip(1)

    with pytest.raises(ChunkDamaged):
        disk.load()


def test_first_believes_what_it_has_checked_and_always_does_not(tmp_path):
    disk = Disk(tmp_path)
    wrong = FileDigests(
        size_bytes=disk.digests.size_bytes,
        part_bytes=PART,
        texts=(digest(b"something else"), *disk.digests.texts[1:]),
    )
    disk.digests = wrong
    disk.parts.found_sound(copy_key(disk.path.stat(), wrong), list(range(6)), parts=6)

    assert disk.load(VerifyDisk.FIRST) == disk.content
    with pytest.raises(ChunkDamaged):
        disk.load(VerifyDisk.ALWAYS)
    with pytest.raises(ChunkDamaged):
        disk.load(VerifyDisk.FIRST)


def test_neighbours_are_read_in_one_go_once_they_were_found_sound(tmp_path, monkeypatch):
    disk = Disk(tmp_path, size=4 * PART)
    runs = []

    def read_run(file: SourceFile, chunks, *, offset: int, length: int):
        runs.append(len(chunks))
        return whole(file, chunks, offset=offset, length=length)

    whole = SourceFile.read_run
    monkeypatch.setattr(SourceFile, "read_run", read_run)
    for expected in ([1, 1], [1, 1, 2]):
        memory = memoryview(bytearray(2 * CHUNK))
        disk.source(VerifyDisk.FIRST).read_run([memory[:CHUNK], memory[CHUNK:]], offset=0, length=2 * CHUNK)

        assert runs == expected
        assert memory == disk.content


def test_the_bad_copy_of_the_stores_own_is_set_aside_with_its_reason(tmp_path):
    folder = tmp_path / "cache" / "some-model"
    folder.mkdir(parents=True)
    disk = Disk(folder)
    disk.cache = tmp_path / "cache"
    disk.flip(2 * PART)

    with pytest.raises(ChunkDamaged, match="fetched again"):
        disk.load()

    kept = tmp_path / "cache" / "damaged" / "some-model-model.safetensors-8192.bytes"
    found = kept.read_bytes()
    assert len(found) == CHUNK
    assert (found[0] ^ 4, found[1:]) == (disk.content[2 * PART], disk.content[2 * PART + 1 : 4 * PART])
    reason = json.loads(kept.with_suffix(".json").read_text())
    assert reason["parts"][0]["begin"] == 2 * PART
    assert disk.forgotten[0][0] == disk.path


def test_bad_copies_are_kept_up_to_a_bound(tmp_path):
    disk = Disk(tmp_path, size=(MAX_KEPT + 3) * CHUNK)
    disk.cache = tmp_path
    for number in range(MAX_KEPT + 3):
        disk.path.write_bytes(disk.content)
        disk.flip(number * CHUNK)
        with pytest.raises(ChunkDamaged):
            disk.load()

    assert len(list((tmp_path / "damaged").glob("*.bytes"))) == MAX_KEPT
    assert len(list((tmp_path / "damaged").glob("*.json"))) == MAX_KEPT


def test_a_full_disk_keeps_no_bad_copy_and_the_load_fails_for_its_own_reason(tmp_path):
    disk = Disk(tmp_path)
    disk.cache = tmp_path
    (tmp_path / "damaged").write_text("a file where the folder should be")
    disk.flip(0)

    with pytest.raises(ChunkDamaged, match="is damaged"):
        disk.load()
    assert disk.forgotten


def test_a_file_that_was_replaced_while_it_was_read_is_checked_and_not_remembered(tmp_path):
    disk = Disk(tmp_path)
    signature = FileSignature.of(disk.path.stat())
    source = VerifiedSource(
        SourceFile(disk.path, signature),
        disk.path,
        disk.digests,
        signature=signature,
        policy=VerifyDisk.FIRST,
        parts=disk.parts,
        report=lambda _copy: "",
        checkers=disk.checkers,
    )
    inner = source._inner
    inner.read(memoryview(bytearray(CHUNK)), offset=0, length=CHUNK)
    new = tmp_path / "new"
    new.write_bytes(bytes(len(disk.content)))
    new.rename(disk.path)
    for at in range(0, len(disk.content), CHUNK):
        source.read(memoryview(bytearray(CHUNK)), offset=at, length=min(CHUNK, len(disk.content) - at))
    source.close()

    with pytest.raises(ChunkDamaged):
        disk.load()


def test_an_error_of_the_disk_is_passed_on(tmp_path):
    disk = Disk(tmp_path)
    disk.path.unlink()
    signature = FileSignature(inode=1, size_bytes=1, modified_ns=1)
    source = VerifiedSource(
        SourceFile(disk.path, signature),
        disk.path,
        disk.digests,
        signature=signature,
        policy=VerifyDisk.FIRST,
        parts=disk.parts,
        report=lambda _copy: "",
        checkers=disk.checkers,
    )

    with pytest.raises(LoadFailed, match="No such file"):
        source.read(memoryview(bytearray(CHUNK)), offset=0, length=CHUNK)
