"""Checkpoints to test with: bytes of safetensors files made by hand, and folders made of them."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

from stoker.checkpoint.dtypes import tensor_bytes

LLAMA_CONFIG: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "max_position_embeddings": 64,
    "vocab_size": 32,
}

Tensors = dict[str, tuple[str, tuple[int, ...], bytes]]
"""Name to dtype, shape and content."""


def header_text(tensors: Tensors, **extra: Any) -> bytes:
    """Return the JSON of a header that places `tensors` in their order."""
    table: dict[str, Any] = dict(extra)
    position = 0
    for name, (dtype, shape, data) in tensors.items():
        end = position + len(data)
        table[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    return json.dumps(table).encode()


def safetensors_bytes(tensors: Tensors, header: bytes | None = None) -> bytes:
    """Return a whole file; `header` replaces the right one."""
    text = header_text(tensors) if header is None else header
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def filled(dtype: str, *shape: int, seed: int = 1) -> tuple[str, tuple[int, ...], bytes]:
    """Return a tensor whose bytes depend on `seed`; valid for every dtype, bool included."""
    nbytes = tensor_bytes(dtype, shape)
    assert nbytes is not None
    pattern = bytes(
        ((index * 7 + seed) % (2 if dtype == "BOOL" else 251)) for index in range(min(nbytes, 4096))
    )
    return dtype, shape, (pattern * (nbytes // max(1, len(pattern)) + 1))[:nbytes]


def write_folder(folder: Path, *shards: Tensors, config: dict[str, Any] | None = None) -> Path:
    """Write a Hugging Face folder: one file, or as many shards as given with their index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(LLAMA_CONFIG if config is None else config))
    (folder / "tokenizer_config.json").write_text("{}")
    if len(shards) == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(shards[0]))
        return folder
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / name).write_bytes(safetensors_bytes(tensors))
        weight_map.update(dict.fromkeys(tensors, name))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def small_model(seed: int = 1) -> Tensors:
    """Return a model of a few odd tensors with the names of a Llama."""
    return {
        "lm_head.weight": filled("F32", 32, 3, seed=seed),
        "model.norm.weight": filled("BF16", 3, seed=seed + 1),
        "model.layers.1.mlp.up_proj.weight": filled("F16", 5, 3, seed=seed + 2),
        "model.layers.0.input_layernorm.weight": filled("BF16", 3, seed=seed + 3),
        "model.embed_tokens.weight": filled("F32", 32, 3, seed=seed + 4),
    }
