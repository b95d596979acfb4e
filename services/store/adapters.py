"""What an adapter is, and whether it fits a checkpoint, from headers alone. Blocks for a few small reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker.checkpoint.adapter import open_adapter
from stoker.errors import CheckpointInvalid
from stoker.v1 import model_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from stoker.checkpoint.adapter import LoraPair
    from stoker.checkpoint.manifest import TensorRecord

_SHOWN_MODULES = 3
_MATRIX = 2


def describe_adapter(
    folder: Path, tensors: Mapping[str, TensorRecord], *, checkpoint: str
) -> model_pb2.AdapterSpec:
    """Return what is in an adapter's folder, its `name` unset.

    Args:
        folder: In PEFT's format.
        tensors: Of the base, by name.
        checkpoint: The base, for messages.

    Raises:
        NotFound: There is no such folder.
        CheckpointInvalid: It is damaged, of an unsupported kind, or for another base.
    """
    adapter = open_adapter(folder)
    faults = {module: _fault(module, pair, tensors) for module, pair in adapter.pairs.items()}
    wrong = [f"{module} ({fault})" for module, fault in faults.items() if fault]
    if wrong:
        more = f" and {len(wrong) - _SHOWN_MODULES} more" if len(wrong) > _SHOWN_MODULES else ""
        raise CheckpointInvalid(
            f"{folder} is no adapter for {checkpoint}: {', '.join(wrong[:_SHOWN_MODULES])}{more}; it was "
            f"trained on {adapter.base_model or 'a model that it does not name'}",
            param="adapters",
        )
    return model_pb2.AdapterSpec(
        uri=str(adapter.path),
        revision=adapter.revision,
        file_bytes=adapter.size_bytes,
        rank=max(pair.rank for pair in adapter.pairs.values()),
        target_modules=adapter.target_names,
    )


def _fault(module: str, pair: LoraPair, tensors: Mapping[str, TensorRecord]) -> str:
    """Say what keeps a pair of matrices from a base's module; empty when nothing does."""
    # Checkpoints of a bare base model lack the first part of the name.
    record = tensors.get(f"{module}.weight") or tensors.get(f"{module.partition('.')[2]}.weight")
    if record is None:
        return "no such module"
    widths = (pair.out_features, pair.in_features)
    if len(record.shape) == _MATRIX and widths in (record.shape, record.shape[::-1]):  # GPT-2's is transposed
        return ""
    return f"its weight is {list(record.shape)}, the adapter's {list(widths)}"
