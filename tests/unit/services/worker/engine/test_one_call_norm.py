from __future__ import annotations

import pytest
import torch
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from services.worker.engine.one_call_norm import OneCallNorm, norm_in_one_call


def norm_of(kind: type[torch.nn.Module], width: int = 64) -> torch.nn.Module:
    norm = kind(width, eps=1e-5)
    norm.weight.data = torch.randn(width)
    return norm


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen3RMSNorm])
@pytest.mark.parametrize("width", [64, 100, 576])
@pytest.mark.parametrize("rows", [1, 9, 32])
def test_a_replaced_norm_has_the_bits_of_its_model(kind, width, rows) -> None:
    torch.manual_seed(rows)
    norm = norm_of(kind, width)
    for scale in (1e-3, 1.0, 30.0):
        x = torch.randn(1, rows, width) * scale
        norm.__class__ = kind
        wanted = norm(x)

        norm_in_one_call(norm)

        assert type(norm) is OneCallNorm
        assert torch.equal(norm(x), wanted)


@pytest.mark.parametrize("norm", [norm_of(Gemma2RMSNorm), norm_of(LlamaRMSNorm).to(torch.bfloat16)])
def test_what_would_get_other_bits_stays_as_it_is(norm) -> None:
    kind = type(norm)

    norm_in_one_call(norm)

    assert type(norm) is kind


def test_other_modules_stay_as_they_are() -> None:
    model = torch.nn.Sequential(torch.nn.LayerNorm(8), torch.nn.Linear(8, 8), torch.nn.RMSNorm(8))

    norm_in_one_call(model)

    assert [type(module) for module in model] == [torch.nn.LayerNorm, torch.nn.Linear, torch.nn.RMSNorm]
