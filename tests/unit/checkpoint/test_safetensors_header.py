"""Claims about headers that nobody vouches for."""

from __future__ import annotations

import json
import random
import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stoker.checkpoint.dtypes import DTYPE_BITS
from stoker.checkpoint.safetensors_header import (
    LENGTH_BYTES,
    SafetensorsHeader,
    header_length,
    parse_header,
)
from stoker.errors import CheckpointInvalid
from tests.unit.checkpoint.builders import filled, header_text, safetensors_bytes, small_model

GOOD = {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}


def parse(file: bytes) -> SafetensorsHeader:
    length = header_length(file[:LENGTH_BYTES], file_bytes=len(file), where="x")
    return parse_header(file[LENGTH_BYTES : LENGTH_BYTES + length], file_bytes=len(file), where="x")


def refuse(header: object, data_bytes: int = 1) -> str:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    with pytest.raises(CheckpointInvalid) as caught:
        parse_header(text, file_bytes=LENGTH_BYTES + len(text) + data_bytes, where="here.safetensors")
    assert caught.value.message.startswith("here.safetensors")
    return caught.value.message


@pytest.mark.parametrize("dtype", DTYPE_BITS)
def test_every_dtype_of_the_format_is_read(dtype: str) -> None:
    header = parse(safetensors_bytes({"a": filled(dtype, 8)}))

    assert header.tensors[0].dtype == dtype
    assert header.tensors[0].nbytes == DTYPE_BITS[dtype]


def test_tensors_come_in_the_order_of_the_file_whatever_the_order_of_the_json() -> None:
    text = json.dumps({"b": {**GOOD, "data_offsets": [1, 2]}, "a": GOOD}).encode()

    header = parse_header(text, file_bytes=LENGTH_BYTES + len(text) + 2, where="x")

    assert [tensor.name for tensor in header.tensors] == ["a", "b"]


def test_spaces_after_the_json_and_metadata_are_read() -> None:
    text = json.dumps({"__metadata__": {"format": "pt"}, "a": GOOD}).encode().ljust(4088)

    header = parse_header(text, file_bytes=4097, where="x")

    assert header.data_start == 4096
    assert header.metadata == {"format": "pt"}


def test_a_scalar_has_one_element_and_an_empty_tensor_none() -> None:
    header = parse(safetensors_bytes({"a": filled("F32"), "b": filled("F32", 3, 0), "c": filled("I8", 2)}))

    assert [tensor.nbytes for tensor in header.tensors] == [4, 0, 2]


@pytest.mark.parametrize("length", [2**63, 2**64 - 1, 100_000_001, 1000])
def test_a_header_length_beyond_file_or_format_is_refused_before_memory_is_taken(length: int) -> None:
    with pytest.raises(CheckpointInvalid):
        header_length(struct.pack("<Q", length), file_bytes=100, where="x")


@pytest.mark.parametrize("size", range(8))
def test_a_file_shorter_than_its_length_prefix_is_refused(size: int) -> None:
    with pytest.raises(CheckpointInvalid, match="no safetensors file"):
        header_length(bytes(size), file_bytes=size, where="x")


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"[]",
        b" {}",
        b"{",
        b"null",
        b'{"a": NaN}',
        b"\xff\xfe{}",
        b'{"a\xff": 1}',
        b'{"a":' * 100_000,
        b'{"a":' + b"[" * 100_000,
        b'{"a":' + b"9" * 10_000 + b"}",
        b'{"__metadata__": {"a": 1}}',
        b'{"__metadata__": []}',
        b'{"__metadata__": {"a": "\\ud800"}}',
    ],
    ids=range(14),
)
def test_a_header_that_is_not_the_json_of_the_format_is_refused(header: bytes) -> None:
    refuse(header, data_bytes=0)


def test_a_header_of_too_many_values_is_refused_before_it_is_parsed() -> None:
    assert "JSON values" in refuse(b'{"a":[' + b"1," * 5_000_000 + b"1]}")


def test_a_key_that_stands_twice_is_refused() -> None:
    one = json.dumps(GOOD)

    assert "twice" in refuse(f'{{"a":{one},"a":{one}}}'.encode())


@pytest.mark.parametrize(
    "entry",
    [
        None,
        [],
        {},
        {**GOOD, "more": 1},
        {**GOOD, "dtype": "C128"},
        {**GOOD, "dtype": 1},
        {**GOOD, "shape": 1},
        {**GOOD, "shape": [-1]},
        {**GOOD, "shape": [1.0]},
        {**GOOD, "shape": [True]},
        {**GOOD, "shape": [2**64]},
        {**GOOD, "shape": [2**62, 2**62]},
        {**GOOD, "shape": [1] * 33},
        {**GOOD, "data_offsets": [0]},
        {**GOOD, "data_offsets": [0, 1, 1]},
        {**GOOD, "data_offsets": [1, 0]},
        {**GOOD, "data_offsets": [-1, 0]},
        {**GOOD, "data_offsets": [0, 2**63]},
        {**GOOD, "data_offsets": ["0", "1"]},
        {"dtype": "F4", "shape": [3], "data_offsets": [0, 1]},
    ],
    ids=str,
)
def test_an_entry_that_cannot_be_is_refused(entry: object) -> None:
    refuse({"a": entry})


@pytest.mark.parametrize(
    "name",
    ["", "../../etc/passwd", "a..b", "/a", "a\\b", "a\x00b", "a\nb", "x" * 1025, "\ud800", "\u202etxt"],
    ids=repr,
)
def test_a_name_that_no_module_can_have_is_refused(name: str) -> None:
    refuse({name: GOOD})


@pytest.mark.parametrize(
    ("first", "second", "says"),
    [
        ([0, 4], [2, 6], "overlaps"),
        ([0, 4], [0, 4], "overlaps"),
        ([0, 4], [5, 9], "hole"),
        ([1, 5], [5, 9], "hole"),
        ([0, 4], [4, 8], "no tensor owns"),
    ],
)
def test_tensors_that_do_not_cover_the_data_exactly_are_refused(
    first: list[int], second: list[int], says: str
) -> None:
    entries = {
        name: {"dtype": "U8", "shape": [4], "data_offsets": place}
        for name, place in (("a", first), ("b", second))
    }

    assert says in refuse(entries, data_bytes=9)


def test_a_truncated_file_is_called_truncated() -> None:
    text = header_text(small_model())

    with pytest.raises(CheckpointInvalid, match="truncated"):
        parse_header(text, file_bytes=LENGTH_BYTES + len(text) + 10, where="x")


SEED_FILE = safetensors_bytes(small_model())
EDITS = st.lists(
    st.tuples(
        st.integers(0, len(SEED_FILE) - 1),
        st.sampled_from([b"", b"0", b"9", b"-", b'"', b"[", b"}", b",", b"\\u0000", b"\xff", b"\x00"]),
        st.integers(0, 2),
    ),
    min_size=1,
    max_size=6,
)


def check_mutated(edits: list[tuple[int, bytes, int]]) -> bool:
    """Replace `cut` bytes at each place; say whether the result was read; fail on anything but a refusal."""
    file = bytearray(SEED_FILE)
    for place, text, cut in edits:
        file[place : place + cut] = text
    try:
        header = parse(bytes(file))
    except CheckpointInvalid:
        return False
    assert header.data_start + sum(tensor.nbytes for tensor in header.tensors) == len(file)
    assert all(tensor.begin <= tensor.end for tensor in header.tensors)
    return True


@settings(max_examples=300, deadline=None)
@given(edits=EDITS)
def test_a_mutated_file_is_read_consistently_or_refused(edits: list[tuple[int, bytes, int]]) -> None:
    """Whatever bytes change, the parser returns a table that covers the file, or raises CheckpointInvalid."""
    check_mutated(edits)


def test_ten_thousand_mutated_files_are_read_consistently_or_refused() -> None:
    """The same with single edits near the header, where they matter, cheap enough for many."""
    rng = random.Random(7)
    header_bytes = len(SEED_FILE) - sum(len(data) for _, _, data in small_model().values())
    outcomes = [
        check_mutated([(rng.randrange(header_bytes), bytes([rng.randrange(256)]), rng.randrange(3))])
        for _ in range(10_000)
    ]

    assert 0 < sum(outcomes) < len(outcomes)


@settings(max_examples=200, deadline=None)
@given(file=st.binary(max_size=200))
def test_random_bytes_are_refused(file: bytes) -> None:
    with pytest.raises(CheckpointInvalid):
        parse(file)
