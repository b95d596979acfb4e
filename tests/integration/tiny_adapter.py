"""A random LoRA adapter for a model of this folder's `tiny_model`, as PEFT writes it."""

from __future__ import annotations

import json
from pathlib import Path

STRENGTH = 0.4
"""Standard deviation of the matrices' elements; wide, so that answers differ."""


def make_tiny_adapter(path: Path, *, seed: int, layers: int = 4, hidden: int = 64, rank: int = 4) -> Path:
    """Write an adapter of all query projections to `path` and return it.

    Args:
        path: Folder to write.
        seed: Of its matrices.
        layers: Of the base.
        hidden: Width of the base; another one makes it an adapter for another model.
        rank: Of the matrices.
    """
    import torch
    from safetensors.torch import save_file

    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for layer in range(layers):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        for side, shape in (("A", (rank, hidden)), ("B", (hidden, rank))):
            tensors[f"{prefix}.lora_{side}.weight"] = torch.randn(shape, generator=generator) * STRENGTH
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path
