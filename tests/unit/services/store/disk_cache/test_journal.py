"""A journal believes whole lines and nothing else."""

from __future__ import annotations

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.store.disk_cache.journal import JOURNAL_NAME, Entry, Journal, parse, render

ENTRIES = [
    Entry(there=True, file="model.safetensors", begin=0, end=100),
    Entry(there=True, file="model.safetensors", begin=100, end=250),
    Entry(there=False, file="model.safetensors", begin=0, end=100),
]
LINES = b"".join(map(render, ENTRIES))


def test_what_was_written_is_read():
    assert list(parse(LINES)) == ENTRIES


@given(st.integers(0, len(LINES)))
def test_a_torn_end_loses_its_own_line_only(length):
    whole = LINES[:length].count(b"\n")
    found = list(parse(LINES[:length]))

    assert found in (ENTRIES[:whole], ENTRIES[: whole + 1])  # only the newline may be missing


@given(st.integers(0, len(LINES) - 1), st.integers(1, 255))
def test_a_damaged_byte_never_makes_another_entry(at, change):
    damaged = LINES[:at] + bytes([LINES[at] ^ change]) + LINES[at + 1 :]

    assert all(entry in ENTRIES for entry in parse(damaged))


@given(st.binary(max_size=200))
def test_noise_is_no_entry(noise):
    assert list(parse(noise)) == []


@pytest.fixture
def directory(tmp_path):
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    yield descriptor
    os.close(descriptor)


def test_a_journal_goes_on_after_a_torn_line(tmp_path, directory):
    first = Journal(directory)
    first.append(ENTRIES[0])
    first.close()
    with (tmp_path / JOURNAL_NAME).open("ab") as file:
        file.write(render(ENTRIES[1])[:-9])
    second = Journal(directory)
    before = second.entries()
    second.append(ENTRIES[2])
    after = second.entries()
    second.close()

    assert before == ENTRIES[:1]
    assert after == [ENTRIES[0], ENTRIES[2]]
