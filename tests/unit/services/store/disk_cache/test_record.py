"""Where a copy came from."""

from __future__ import annotations

import pytest

from services.store.disk_cache.record import OriginRecord, folder_name, modified_ns, parse, render
from services.store.origins.origin import RemoteFile
from stoker.errors import CheckpointInvalid

FILE = RemoteFile(name="config.json", size_bytes=10, version='"tag"')
RECORD = OriginRecord(uri="s3://b/m", revision="r", files={FILE.name: FILE})


def test_what_was_written_is_read():
    assert parse(render(RECORD), where="x") == RECORD


@pytest.mark.parametrize("text", [b"", b"{}", b"[]", render(RECORD)[:-10], b'{"version": 2}'])
def test_a_damaged_record_is_refused(text):
    with pytest.raises(CheckpointInvalid):
        parse(text, where="x")


def test_a_file_s_time_changes_with_its_version_only():
    same = RemoteFile(name="config.json", size_bytes=10, version='"tag"')
    other = RemoteFile(name="config.json", size_bytes=10, version='"tug"')

    assert modified_ns(FILE) == modified_ns(same) != modified_ns(other)


def test_a_folder_s_name_is_plain_and_one_per_revision():
    names = {folder_name("s3://b/m", "r"), folder_name("s3://b/m", "q"), folder_name("s3://b/n", "r")}

    assert len(names) == 3
    assert all(name.replace("-", "").isalnum() for name in names)
