"""Traces from files: what becomes of them, and what is refused."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from services.controller.simulation.traces import read_invocations, read_lengths, read_requests
from services.controller.simulation.workload import Lengths
from stoker.errors import InvalidRequest
from stoker.ids import ModelName

MODELS = [ModelName("a"), ModelName("b"), ModelName("c")]
FEW_TOKENS = Lengths.constant(10, 20)
HEADER = "arrival_s,input_tokens,output_tokens\n"


def write(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_a_trace_without_models_is_dealt_out_in_turn(tmp_path: Path) -> None:
    path = write(tmp_path, "arrival_s,input_tokens,output_tokens\n" + "0.5,3,4\n" * 4)

    assert [request.model for request in read_requests(path, MODELS)] == ["a", "b", "c", "a"]


def test_a_trace_with_models_is_ordered_by_arrival(tmp_path: Path) -> None:
    path = write(tmp_path, "arrival_s,model,input_tokens,output_tokens\n2.0,b,1,1\n1.0,c,5,6\n")

    requests = read_requests(path, MODELS)

    assert [(request.arrival_seconds, request.model) for request in requests] == [(1.0, "c"), (2.0, "b")]


def test_an_unknown_model_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "arrival_s,model,input_tokens,output_tokens\n1.0,a,1,1\n1.0,zebra,1,1\n")

    with pytest.raises(InvalidRequest, match="line 3: model 'zebra'"):
        read_requests(path, MODELS)


@pytest.mark.parametrize("text", ["", "arrival_s,input_tokens\n1,2\n"])
def test_a_file_without_the_columns_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidRequest, match="output_tokens"):
        read_requests(write(tmp_path, text), MODELS)


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"nowhere\.csv cannot be read"):
        read_requests(tmp_path / "nowhere.csv", MODELS)


def test_a_number_that_is_none_is_refused_with_its_line(tmp_path: Path) -> None:
    path = write(tmp_path, "arrival_s,input_tokens,output_tokens\n1.0,2,3\nsoon,2,3\n")

    with pytest.raises(InvalidRequest, match="line 3"):
        read_requests(path, MODELS)


def test_lengths_are_cut_to_the_context(tmp_path: Path) -> None:
    path = tmp_path / "lengths.csv.gz"
    with gzip.open(path, "wt") as file:
        file.write("input_tokens,output_tokens\n9000,500\n10,9000\n")

    lengths = read_lengths(path, context_tokens=1000)

    assert list(zip(lengths.input_tokens, lengths.output_tokens, strict=True)) == [(500, 500), (10, 990)]


def test_invocations_fall_into_their_minutes_and_are_thinned_to_the_rate(tmp_path: Path) -> None:
    counts = "\n".join(f"f{index},600,0,1200" for index in range(4))
    path = write(tmp_path, f"func,m1,m2,m3\n{counts}\n")

    requests = read_invocations(
        path, MODELS, FEW_TOKENS, minutes=range(1, 4), requests_per_second=10.0, seed=1
    )

    in_minute = np.bincount([int(request.arrival_seconds // 60) for request in requests], minlength=3)
    assert len(requests) == pytest.approx(1800, rel=0.05)
    assert in_minute[1] == 0
    assert in_minute[2] == pytest.approx(2 * in_minute[0], rel=0.1)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("-1.0,2,3", "arrival_s is '-1.0'"),
        ("nan,2,3", "arrival_s is 'nan'"),
        ("inf,2,3", "arrival_s is 'inf'"),
        ("0.5,-2,3", "input_tokens is '-2'"),
        ("0.5,2", "output_tokens is None"),
        ("0.5,2,2.5", "output_tokens is '2.5'"),
        ("1e300,2,3", "arrival_s is '1e300'"),
        ("0.5,2,99999999999999999999", "output_tokens is '99999999999999999999'"),
    ],
)
def test_what_is_no_time_or_no_count_is_refused_by_line_and_column(
    tmp_path: Path, row: str, said: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"line 2: {said}"):
        read_requests(write(tmp_path, f"{HEADER}{row}\n"), MODELS)


def test_an_empty_trace_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="no requests after it"):
        read_requests(write(tmp_path, HEADER), MODELS)
    with pytest.raises(InvalidRequest, match="no lengths after it"):
        read_lengths(write(tmp_path, HEADER), context_tokens=100)


def test_what_is_no_text_is_no_csv(tmp_path: Path) -> None:
    path, packed, damaged = (tmp_path / name for name in ("trace.csv", "trace.csv.gz", "damaged.csv.gz"))
    path.write_bytes(b"\xff\xfe\x00")
    packed.write_bytes(gzip.compress(HEADER.encode() * 100)[:30])
    damaged.write_bytes(packed.read_bytes()[:10] + bytes(range(255, 200, -1)))  # its header, then no deflate

    for no_csv in (path, damaged):
        with pytest.raises(InvalidRequest, match="is no CSV"):
            read_requests(no_csv, MODELS)
    with pytest.raises(InvalidRequest, match="cannot be read"):
        read_requests(packed, MODELS)


def test_invocations_of_minutes_that_the_file_has_not_are_refused_in_few_words(tmp_path: Path) -> None:
    path = write(tmp_path, "func,m1\nf,0\n")

    with pytest.raises(InvalidRequest, match="no column m2, m3, m4 and 96 more"):
        read_invocations(path, MODELS, FEW_TOKENS, minutes=range(1, 101), requests_per_second=1, seed=1)
    with pytest.raises(InvalidRequest, match="no invocation in minutes 1 to 1"):
        read_invocations(path, MODELS, FEW_TOKENS, minutes=range(1, 2), requests_per_second=1, seed=1)
