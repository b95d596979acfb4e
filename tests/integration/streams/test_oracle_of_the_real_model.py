"""A handful of the oracle's positions on the real chat model; `make oracle` takes all of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.oracle import Case, Model
from tests.integration.streams.engines import text_of

POSITIONS = 6


@pytest.fixture(scope="module")
def model(real_model: Path) -> Model:
    """In the dtype whose rounding is the coarsest."""
    return Model(real_model, "bfloat16", text_of(real_model), POSITIONS)


@pytest.mark.model
@pytest.mark.parametrize(
    ("fault", "batch", "sampling", "positions"),
    [
        ("kill", "alone", "sampled", (0, 3, 6)),
        ("move", "mixed", "sampled", (2, 5)),
    ],
)
async def test_the_real_models_answer_is_the_same_to_the_bit(
    model: Model, fault: str, batch: str, sampling: str, positions: tuple[int, ...]
) -> None:
    case = Case(dtype="bfloat16", sampling=sampling, batch=batch, fault=fault)

    assert await model.is_equal(case, positions)
