"""Random models of a chosen size with a real tokenizer, made once per benchmark run; they answer nonsense."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

HIDDEN = 512
INTERMEDIATE = 1024
VOCABULARY = 384
HEADS = 8
KV_HEADS = 4
CHAT_TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
TEXT = "the quick brown fox jumps over the lazy dog. pack my box with five dozen liquor jugs! 0123456789\n"
HEAD_WIDTH = HIDDEN // HEADS


def make_small_model(folder: Path, *, megabytes: int, seed: int) -> int:
    """Write a random Llama (float32) of about this many MB; returns the bytes of its weights.

    Args:
        folder: Made; must not exist.
        megabytes: Of weights; at least one layer is written.
        seed: Of the weights.
    """
    from safetensors.numpy import save_file  # noqa: PLC0415 - a benchmark that makes no models needs none

    folder.mkdir(parents=True)
    _write_tokenizer(folder)
    layers = _layers(megabytes)
    (folder / "config.json").write_text(json.dumps(_config(layers)))
    generator = np.random.default_rng(seed)
    weights = {
        name: (0.02 * generator.standard_normal(shape, dtype=np.float32)) for name, shape in _shapes(layers)
    }
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return sum(weight.nbytes for weight in weights.values())


def small_model_bytes(megabytes: int) -> int:
    """Return the weight bytes of such a model: whole layers."""
    return 4 * sum(int(np.prod(shape)) for _, shape in _shapes(_layers(megabytes)))


def _layers(megabytes: int) -> int:
    return max(1, round(megabytes * 10**6 / _layer_bytes()))


def _config(layers: int) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": HIDDEN,
        "intermediate_size": INTERMEDIATE,
        "num_hidden_layers": layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 0,
        "eos_token_id": 1,
    }


def _layer_shapes() -> dict[str, tuple[int, ...]]:
    narrow = HEAD_WIDTH * KV_HEADS
    return {
        "self_attn.q_proj.weight": (HIDDEN, HIDDEN),
        "self_attn.k_proj.weight": (narrow, HIDDEN),
        "self_attn.v_proj.weight": (narrow, HIDDEN),
        "self_attn.o_proj.weight": (HIDDEN, HIDDEN),
        "mlp.gate_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.up_proj.weight": (INTERMEDIATE, HIDDEN),
        "mlp.down_proj.weight": (HIDDEN, INTERMEDIATE),
        "input_layernorm.weight": (HIDDEN,),
        "post_attention_layernorm.weight": (HIDDEN,),
    }


def _layer_bytes() -> int:
    return 4 * sum(int(np.prod(shape)) for shape in _layer_shapes().values())


def _shapes(layers: int) -> list[tuple[str, tuple[int, ...]]]:
    found: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (VOCABULARY, HIDDEN))]
    for layer in range(layers):
        found += [(f"model.layers.{layer}.{name}", shape) for name, shape in _layer_shapes().items()]
    return [*found, ("model.norm.weight", (HIDDEN,))]


def _write_tokenizer(folder: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers  # noqa: PLC0415 - as above

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<|bos|>", "<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator([TEXT] * 4, trainer)
    core.save(str(folder / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<|bos|>",
        "eos_token": "<|end|>",
        "chat_template": CHAT_TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(described))
