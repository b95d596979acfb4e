"""The numbers and names of checkpoint layout 1, in one place for the writer and every reader."""

from __future__ import annotations

from typing import Final

from stoker.units import MIB

LAYOUT_VERSION = 1
"""Version written into `stoker.json`; a reader refuses any other."""

MANIFEST_NAME = "stoker.json"
"""Written last: a converted checkpoint without it does not exist."""

WEIGHTS_NAME = "model.safetensors"
"""The weights of a checkpoint that has one rank; `from_pretrained` opens the folder as it is."""


def weights_names(ranks: int) -> tuple[str, ...]:
    """Return the names of the weights files of a converted checkpoint, by rank."""
    if ranks == 1:
        return (WEIGHTS_NAME,)
    return tuple(f"rank-{rank}-of-{ranks}.safetensors" for rank in range(ranks))


SHARD_INDEX_NAME = "model.safetensors.index.json"
"""Where Hugging Face lists the shards of a checkpoint that has several files."""

CONFIG_NAME = "config.json"

ADAPTER_CONFIG_NAME = "adapter_config.json"
ADAPTER_WEIGHTS_NAME = "adapter_model.safetensors"
"""What PEFT calls the files of a LoRA adapter."""

ADAPTER_LAYOUT: Final = "adapter"
"""What a store calls an adapter that it moves like a checkpoint."""

DATA_ALIGNMENT_BYTES = 4096
"""Tensor data starts on this boundary: the strictest that direct I/O asks for."""

TENSOR_ALIGNMENT_BYTES = 256
"""Every tensor starts on this boundary: what CUDA allocations promise and vector loads want."""

CHUNK_BYTES = 16 * MIB
"""What one digest covers, counted from the file's first byte; the last chunk may be shorter."""

PAD_PREFIX = "__stoker_pad__."
"""Names of the U8 filler entries that close the gaps between tensors: the format allows no holes."""

PARTIAL_INFIX = ".partial-"
"""`<dst>.partial-<random>` is a conversion under way, or what a dead one left."""


def is_padding(name: str) -> bool:
    """Say whether the entry `name` is filler and not a tensor of the model."""
    return name.startswith(PAD_PREFIX)


def chunk_count(size_bytes: int, chunk_bytes: int) -> int:
    """Return how many chunks a file of `size_bytes` has; an empty file has none."""
    return -(-size_bytes // chunk_bytes)
