"""What was found sound is believed until the copy changes, also by the next daemon."""

from __future__ import annotations

import os

from services.store.integrity.digests import FileDigests
from services.store.integrity.verified_parts import VerifiedParts, copy_key

DIGESTS = FileDigests(size_bytes=4, part_bytes=2, texts=("a", "b"))


def test_a_copy_that_is_sound_to_its_last_part_is_believed_after_a_restart(tmp_path):
    before = VerifiedParts(tmp_path / "verified")
    before.found_sound("k", [0], parts=2)
    unfinished = VerifiedParts(tmp_path / "verified").is_sound("k", 0, parts=2)
    before.found_sound("k", [1], parts=2)

    after = VerifiedParts(tmp_path / "verified")

    assert not unfinished
    assert [after.is_sound("k", part, parts=2) for part in (0, 1)] == [True, True]
    assert not after.is_sound("another", 0, parts=2)


def test_parts_are_believed_one_by_one_within_a_daemon():
    known = VerifiedParts(None)
    known.found_sound("k", [1], parts=3)
    known.found_sound("k", [1], parts=3)

    assert [known.is_sound("k", part, parts=3) for part in range(3)] == [False, True, False]


def test_a_damaged_copy_is_believed_no_more(tmp_path):
    known = VerifiedParts(tmp_path)
    known.found_sound("k", [0], parts=1)
    known.found_damaged("k")

    assert not known.is_sound("k", 0, parts=1)
    assert not VerifiedParts(tmp_path).is_sound("k", 0, parts=1)


def test_what_is_remembered_is_bounded_and_the_oldest_goes(tmp_path):
    known = VerifiedParts(tmp_path, max_copies=2)
    for number, key in enumerate("abc"):
        known.found_sound(key, [0], parts=1)
        os.utime(tmp_path / key, ns=(number, number))

    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "c"]


def test_a_record_that_cannot_be_written_costs_no_load(tmp_path):
    (tmp_path / "verified").write_text("a file where the folder should be")
    known = VerifiedParts(tmp_path / "verified")

    known.found_sound("k", [0], parts=1)

    assert known.is_sound("k", 0, parts=1)


def test_writing_to_a_file_makes_another_copy_of_it_even_when_its_time_is_set_back(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"1234")
    status = path.stat()
    before = copy_key(status, DIGESTS)
    path.write_bytes(b"1235")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))

    assert path.stat().st_mtime_ns == status.st_mtime_ns
    assert copy_key(path.stat(), DIGESTS) != before


def test_other_digests_make_another_copy(tmp_path):
    status = tmp_path.stat()
    other = FileDigests(size_bytes=4, part_bytes=2, texts=("a", "c"))

    assert copy_key(status, DIGESTS) != copy_key(status, other)
