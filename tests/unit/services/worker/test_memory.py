"""What fits on a device, and how many tokens a cache holds."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from services.worker.kv.kv_budget import kv_bytes_per_token, max_kv_tokens
from services.worker.load import dtype_named
from services.worker.memory import check_room, device_of
from stoker.errors import CapacityError, DoesNotFit, InvalidRequest


def test_a_tokens_cache_is_keys_and_values_of_every_layer() -> None:
    config = LlamaConfig(
        num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, hidden_size=64, head_dim=16
    )

    assert kv_bytes_per_token(config, torch.bfloat16) == 2 * 3 * 2 * 16 * 2


def test_a_cache_that_holds_no_token_is_refused() -> None:
    assert max_kv_tokens(1000, 100) == 10
    with pytest.raises(DoesNotFit, match="raise kv_cache_bytes"):
        max_kv_tokens(99, 100)


def test_what_is_larger_than_the_device_can_never_fit() -> None:
    with pytest.raises(DoesNotFit, match=r"needs 11 B; there are 10 B"):
        check_room("it", need_bytes=11, total_bytes=10, free_bytes=10)


def test_what_is_larger_than_the_free_part_may_fit_later() -> None:
    with pytest.raises(CapacityError, match="are free") as refused:
        check_room("it", need_bytes=9, total_bytes=10, free_bytes=8)
    assert refused.value.retry_after_seconds is not None


def test_what_fits_is_let_through() -> None:
    check_room("it", need_bytes=8, total_bytes=10, free_bytes=8)


def test_no_device_index_means_the_processor() -> None:
    assert device_of([]) == torch.device("cpu")


def test_several_devices_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="one device"):
        device_of([0, 1])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_cuda_device_that_torch_does_not_see_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="CUDA device 3"):
        device_of([3])


def test_weights_are_kept_as_stored_unless_a_dtype_is_named() -> None:
    assert dtype_named("auto") is None
    assert dtype_named("bfloat16") is torch.bfloat16
    with pytest.raises(InvalidRequest, match="int3"):
        dtype_named("int3")
