from __future__ import annotations

import pytest
import torch

from services.worker.engine import row_proof
from services.worker.engine.row_proof import ProductShape, RowProofs, sums_alike

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def shape(dtype: torch.dtype = torch.float32, **changes: object) -> ProductShape:
    fields = {
        "rows": 6,
        "group": 3,
        "terms": 192,
        "columns": 128,
        "block_columns": 128,
        "is_widened": False,
        "dtype": dtype,
        "is_transposed": True,
        "has_bias": False,
        "is_strided": False,
        "offset_bytes": 0,
        "threads": 1,
    }
    return ProductShape(**(fields | changes))


def by_rows(rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor) -> None:
    """Sum in one order for few rows, from the other end for many: as a library may."""
    terms = range(rows.shape[1]) if len(rows) <= 3 else reversed(range(rows.shape[1]))
    total = torch.zeros(out.shape) if bias is None else bias.float().expand(out.shape).clone()
    for k in terms:
        total += rows[:, k, None].float() * weight[None, k].float()
    out.copy_(total)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_another_order_of_summation_is_noticed_in_every_dtype(dtype, has_bias, monkeypatch) -> None:
    monkeypatch.setattr(row_proof, "product", by_rows)

    assert not sums_alike(shape(dtype, has_bias=has_bias))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"terms": 193},
        {"is_transposed": False},
        {"is_strided": True, "has_bias": True},
        {"offset_bytes": 8},
        {"block_columns": 64},
        {"is_widened": True, "has_bias": True},
    ],
)
def test_the_same_order_of_summation_is_recognised(dtype, changes, monkeypatch) -> None:
    monkeypatch.setattr(row_proof, "product", lambda r, w, b, o: by_rows(r[:3], w, b, o[:3]) or o[3:].zero_())

    assert sums_alike(shape(dtype, rows=3, **changes))


def test_a_shape_counts_as_proven_only_after_its_proof() -> None:
    proofs = RowProofs()
    wanted = shape(rows=3)

    before = proofs.holds(wanted)
    worked = proofs.prove_next()

    assert (before, worked, proofs.holds(wanted)) == (False, True, True)
    assert not proofs.prove_next()


def test_what_is_wanted_twice_is_proven_once() -> None:
    proofs = RowProofs()
    for _ in range(3):
        proofs.holds(shape())

    assert proofs.prove_next()
    assert not proofs.prove_next()


def test_the_number_of_shapes_is_bounded(monkeypatch) -> None:
    monkeypatch.setattr(row_proof, "MAX_SHAPES", 2)
    proofs = RowProofs()
    for rows in (3, 6, 9, 12):
        proofs.holds(shape(rows=rows))

    assert [proofs.prove_next() for _ in range(3)] == [True, True, False]


def test_a_proof_that_was_made_at_once_is_not_made_again(monkeypatch) -> None:
    tried: list[ProductShape] = []
    monkeypatch.setattr(row_proof, "sums_alike", lambda tested: not tried.append(tested))
    proofs = RowProofs()
    proofs.holds(shape())

    assert proofs.prove(shape())
    assert proofs.prove_next()

    assert tried == [shape()]
    assert proofs.holds(shape())


def test_a_shape_beyond_what_is_remembered_is_not_tried(monkeypatch) -> None:
    monkeypatch.setattr(row_proof, "MAX_SHAPES", 1)
    proofs = RowProofs()

    assert proofs.prove(shape(rows=3))
    assert not proofs.prove(shape(rows=6))
