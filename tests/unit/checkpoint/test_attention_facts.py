"""What config.json says about the key/value cache."""

from __future__ import annotations

import json

import pytest

from stoker.checkpoint.attention_facts import read_attention_facts


def facts(**config):
    return read_attention_facts(json.dumps(config).encode(), where="config.json")


def test_grouped_queries_keep_fewer_heads():
    """SmolLM2-135M: 30 layers * 2 * 3 heads * 64 elements * 2 bytes."""
    found = facts(num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3, hidden_size=576)

    assert found.kv_bytes_per_token("BF16") == 30 * 2 * 3 * 64 * 2


def test_a_head_dimension_that_is_stated_wins_over_the_quotient():
    assert facts(num_hidden_layers=1, num_attention_heads=4, hidden_size=64, head_dim=256).head_dim == 256


@pytest.mark.parametrize(
    "config",
    [
        {"n_layer": 2, "n_head": 4, "n_embd": 32},
        {"text_config": {"num_hidden_layers": 2, "num_attention_heads": 4, "hidden_size": 32}},
    ],
)
def test_older_names_and_nested_configs_are_known(config):
    assert facts(**config).kv_bytes_per_token("F32") == 2 * 2 * 4 * 8 * 4


def test_one_head_for_all_queries():
    assert facts(n_layer=1, n_head=8, n_embd=64, multi_query=True).kv_heads == 1


def test_a_latent_cache_counts_what_it_keeps():
    found = facts(num_hidden_layers=2, num_attention_heads=16, kv_lora_rank=512, qk_rope_head_dim=64)

    assert found.kv_bytes_per_token("BF16") == 2 * (512 + 64) * 2


def test_quantised_weights_do_not_quantise_the_cache():
    found = facts(num_hidden_layers=1, num_attention_heads=1, hidden_size=8)

    assert found.kv_bytes_per_token("F8_E4M3") == 2 * 8 * 2


@pytest.mark.parametrize("wrong", [None, "12", -1, 1.5, True, 10**30])
def test_what_is_not_stated_sensibly_counts_as_not_stated(wrong):
    assert facts(num_hidden_layers=wrong, num_attention_heads=4, hidden_size=8).kv_bytes_per_token("F32") == 0
