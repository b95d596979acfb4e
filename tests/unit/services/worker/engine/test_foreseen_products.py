from __future__ import annotations

import pytest
import torch

from services.worker.engine import row_product
from services.worker.engine.foreseen_products import prove_foreseen
from services.worker.engine.row_proof import ProductShape, RowProofs


@pytest.fixture(name="proofs")
def _proofs(monkeypatch: pytest.MonkeyPatch) -> RowProofs:
    """Nothing is proven yet in this process."""
    proofs = RowProofs()
    monkeypatch.setattr(row_product, "PROOFS", proofs)
    monkeypatch.setattr(row_product, "_CUTS", {})
    return proofs


def proven(proofs: RowProofs) -> set[ProductShape]:
    return set(proofs._proven)


def prefill_of(weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    row_product.row_product(64, 32, weight.t(), bias)


def test_the_first_prefill_of_a_foreseen_model_has_nothing_left_to_prove(proofs) -> None:
    tensors = {
        "layers.0.q.weight": torch.empty(96, 64),
        "layers.0.q.bias": torch.empty(96),
        "layers.0.o.weight": torch.empty(64, 96),
    }

    prove_foreseen(tensors, tensors, group_rows=32)
    foreseen = proven(proofs)
    row_product._CUTS.clear()
    prefill_of(tensors["layers.0.q.weight"], tensors["layers.0.q.bias"])
    prefill_of(tensors["layers.0.o.weight"])

    assert len(foreseen) == 2
    assert proven(proofs) == foreseen


def test_layers_of_one_shape_are_proven_once_and_what_is_not_multiplied_never(proofs) -> None:
    tensors = {
        "layers.0.q.weight": torch.empty(64, 64),
        "layers.1.q.weight": torch.empty(64, 64),
        "layers.0.norm.weight": torch.empty(64),
        "layers.0.nothing.weight": torch.empty(64, 0),
        "layers.0.codes.weight": torch.empty(64, 128, dtype=torch.int8),
        "embed.weight": torch.empty(500, 64),
    }

    prove_foreseen(tensors, [name for name in tensors if "layers" in name], group_rows=32)

    assert [(shape.terms, shape.columns) for shape in proven(proofs)] == [(64, 64)]


def test_weights_that_were_renamed_are_passed_over(proofs) -> None:
    prove_foreseen({}, ["layers.0.q.weight"], group_rows=32)

    assert proven(proofs) == set()


def test_a_prefill_proves_what_it_lacks_and_a_decode_pass_only_wants_it(proofs) -> None:
    prefill_of(torch.randn(64, 64))
    row_product.row_product(6, 3, torch.randn(64, 64).t(), None)

    assert [shape.rows for shape in proven(proofs)] == [64]
    assert proofs.prove_next()
    assert not proofs.prove_next()
