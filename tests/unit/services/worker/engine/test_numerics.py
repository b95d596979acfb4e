from __future__ import annotations

import pytest
import torch

from services.worker.engine import numerics as module
from services.worker.engine.numerics import numerics


def line(**changes: object) -> str:
    fields = {
        "engine": "transformers",
        "dtype": torch.bfloat16,
        "device": torch.device("cpu"),
        "group_rows": 2,
        "prefill_group_rows": 32,
        "prefill_chunk_tokens": 256,
    }
    return numerics(**(fields | changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"engine": "other"},
        {"dtype": torch.float32},
        {"group_rows": 3},
        {"prefill_group_rows": 64},
        {"prefill_chunk_tokens": 128},
    ],
)
def test_whatever_decides_bits_changes_the_line(changes) -> None:
    assert line(**changes) != line()


def test_another_number_of_threads_changes_the_line(monkeypatch) -> None:
    before = line()
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)

    assert line() != before


def test_builds_of_one_version_that_compute_otherwise_have_different_lines(monkeypatch) -> None:
    before = line()
    monkeypatch.setattr(module, "REVISION", module.REVISION + 1)

    assert line() != before


@pytest.mark.parametrize("unit", ["avx512_bf16", "amx_tile", "amx_fp16"])
def test_processors_that_differ_in_their_units_for_small_floats_have_different_lines(
    unit, monkeypatch
) -> None:
    monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda: False)
    without = line()
    monkeypatch.setattr(torch.cpu, f"_is_{unit}_supported", lambda: True)

    assert line() != without
