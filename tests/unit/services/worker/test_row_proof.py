from __future__ import annotations

import pytest
import torch

from services.worker import row_proof
from services.worker.row_proof import Product, cut_rows, prove

WEIGHT = torch.randn((48, 80), generator=torch.Generator().manual_seed(1))


@pytest.fixture(autouse=True)
def _no_proofs_of_others(monkeypatch) -> None:
    monkeypatch.setattr(row_proof, "_PROVEN", {})


def by_rows(x, weight, bias, group):
    return torch.cat([row[None] @ weight for row in x])


def product(*, differs_from: int, weight=WEIGHT, position: int | None = None) -> Product:
    """Return a product whose `whole` has other bits in some row from so many rows on."""

    def whole(x, weight, bias):
        out = by_rows(x, weight, bias, 3)
        if x.shape[0] >= differs_from:
            out[position or 0, 7] *= 1 + 2**-23
        return out

    return Product(group=3, weight=weight, bias=None, whole=whole, by_groups=by_rows)


def test_rows_are_cut_into_the_largest_proven_products() -> None:
    assert cut_rows(product(differs_from=12), 21, 15, may_prove=True) == [9, 9, 3]


def test_nothing_larger_than_asked_for_is_tried() -> None:
    assert cut_rows(product(differs_from=99), 33, 16, may_prove=True) == [15, 15, 3]


def test_without_a_proof_groups_remain() -> None:
    assert cut_rows(product(differs_from=4), 9, 15, may_prove=True) == [3, 3, 3]


def test_a_pass_without_time_uses_earlier_proofs_and_makes_none() -> None:
    cut = product(differs_from=99)

    assert cut_rows(cut, 6, 15, may_prove=False) == [3, 3]
    assert cut_rows(cut, 6, 15, may_prove=True) == [6]
    assert cut_rows(cut, 6, 15, may_prove=False) == [6]


@pytest.mark.parametrize("position", range(6))
def test_one_bit_in_one_row_refutes(position: int) -> None:
    assert not prove(product(differs_from=6, position=position), 6)


def test_a_weight_of_zeros_proves_nothing() -> None:
    assert not prove(product(differs_from=99, weight=torch.zeros_like(WEIGHT)), 6)
