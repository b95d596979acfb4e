"""Small checkpoints in place, for tests of the store."""

from __future__ import annotations

import json
import struct
from pathlib import Path


def write_checkpoint(folder: Path, *, names=("model.layers.0.w", "lm_head.weight"), size: int = 64) -> Path:
    """A checkpoint in place, its tensors filled with ones."""
    folder.mkdir(parents=True, exist_ok=True)
    table = {
        name: {"dtype": "U8", "shape": [size], "data_offsets": [at * size, (at + 1) * size]}
        for at, name in enumerate(names)
    }
    header = json.dumps(table).encode()
    content = struct.pack("<Q", len(header)) + header + b"\x01" * size * len(names)
    (folder / "model.safetensors").write_bytes(content)
    config = {"architectures": ["LlamaForCausalLM"], "num_hidden_layers": 1, "vocab_size": 7}
    (folder / "config.json").write_text(json.dumps(config))
    return folder
