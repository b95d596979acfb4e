"""Traces: what files and arrival processes become."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest

from services.controller.simulation.workload import (
    Lengths,
    gamma_requests,
    read_invocations,
    read_lengths,
    read_requests,
    realised,
)
from stoker.errors import InvalidRequest
from stoker.ids import ModelName

MODELS = [ModelName("a"), ModelName("b"), ModelName("c")]
FEW_TOKENS = Lengths.constant(10, 20)


def write(folder: Path, text: str) -> Path:
    path = folder / "trace.csv"
    path.write_text(text)
    return path


def test_gamma_arrivals_have_the_rate_and_the_variation_that_was_asked_for() -> None:
    requests = gamma_requests(
        MODELS[:1], requests_per_second=2.0, seconds=20_000, cv=4.0, lengths=FEW_TOKENS, seed=5
    )

    rate, cv = realised(requests)

    assert rate == pytest.approx(2.0, rel=0.01)
    assert cv == pytest.approx(4.0, rel=0.1)


def test_the_same_seed_gives_the_same_requests_and_another_seed_others() -> None:
    first, second, third = (
        gamma_requests(MODELS, requests_per_second=1.0, seconds=100, cv=2.0, lengths=FEW_TOKENS, seed=seed)
        for seed in (1, 1, 2)
    )

    assert first == second
    assert first != third


def test_popularity_decides_who_is_asked() -> None:
    requests = gamma_requests(
        MODELS,
        requests_per_second=10.0,
        seconds=1000,
        cv=1.0,
        lengths=FEW_TOKENS,
        seed=1,
        popularity=[8, 2, 0],
    )

    share = np.mean([request.model == "a" for request in requests])

    assert share == pytest.approx(0.8, abs=0.02)
    assert not any(request.model == "c" for request in requests)


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
