from __future__ import annotations

import pytest
import torch
from transformers.pytorch_utils import Conv1D

from services.worker.engine.attention import planned
from services.worker.engine.row_linear import make_rows_uniform
from services.worker.engine.row_product import PROOFS

ROW_COUNTS = {3: (3, 6, 9), 2: (2, 8), 32: (32, 64, 96)}


class Groups:
    """A plan whose products all take groups of `rows`."""

    def __init__(self, rows: int) -> None:
        self._rows = rows

    def group_of(self, rows: int) -> int:
        """See `ForwardPlan`."""
        return self._rows


def layer_of(kind: str, dtype: torch.dtype) -> torch.nn.Module:
    torch.manual_seed(3)
    # More columns than a block holds, the last block narrower.
    layer = torch.nn.Linear(576, 900) if kind == "linear" else Conv1D(900, 576)
    layer.to(dtype)
    make_rows_uniform(layer)
    return layer


def by_layer(layer: torch.nn.Module, x: torch.Tensor, group: int) -> torch.Tensor:
    with torch.inference_mode(), planned(Groups(group)):
        return layer(x)


@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize(
    ("dtype", "group"),
    [(torch.float32, 3), (torch.float32, 32), (torch.bfloat16, 2), (torch.bfloat16, 32), (torch.float16, 32)],
)
def test_a_row_has_the_bits_of_its_group_before_and_after_proofs(kind, dtype, group) -> None:
    layer = layer_of(kind, dtype)
    x = torch.randn(96, 576).to(dtype)
    alone = torch.cat([by_layer(layer, x[top : top + group], group) for top in range(0, 96, group)])
    before = {count: by_layer(layer, x[:count], group) for count in ROW_COUNTS[group]}
    while PROOFS.prove_next():
        pass

    for count, unproven in before.items():
        assert torch.equal(unproven, alone[:count])
        assert torch.equal(by_layer(layer, x[:count], group), alone[:count])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_floats_of_a_prefill_are_within_one_rounding_of_the_exact_product(dtype) -> None:
    layer = layer_of("linear", dtype)
    x = torch.randn(64, 576).to(dtype)
    exact = x.double() @ layer.weight.double().t() + layer.bias.double()

    made = by_layer(layer, x, 32)

    assert made.dtype is dtype
    torch.testing.assert_close(made.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-5)
