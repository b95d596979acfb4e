"""What an adapter is, and whether it fits a checkpoint, from headers alone. Blocks for a few small reads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker.checkpoint.adapter import open_adapter, plan_of
from stoker.checkpoint.layout import ADAPTER_CONFIG_NAME, ADAPTER_LAYOUT
from stoker.errors import CheckpointInvalid
from stoker.v1 import model_pb2

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from services.store.catalog import CatalogEntry
    from stoker.checkpoint.adapter import LoraPair, LoraPlan
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
    _check_fit(adapter, tensors, checkpoint)
    return _described(adapter, str(adapter.path), revision=adapter.revision, file_bytes=adapter.size_bytes)


def describe_far_adapter(
    entry: CatalogEntry, tensors: Mapping[str, TensorRecord], *, checkpoint: str
) -> model_pb2.AdapterSpec:
    """Return what an adapter is that the store has to fetch, its `name` unset.

    Args:
        entry: Of the adapter's uri.
        tensors: Of the base, by name.
        checkpoint: The base, for messages.

    Raises:
        CheckpointInvalid: It is a whole model, damaged, of an unsupported kind, or for another base.
    """
    if entry.index.layout != ADAPTER_LAYOUT:
        raise CheckpointInvalid(
            f"{entry.uri} holds a whole model ({entry.index.facts.architecture or 'of no stated kind'}), no "
            "adapter: deploy it by itself, or give the folder with adapter_config.json",
            param="adapters",
        )
    stored = {tensor.name: tensor for tensor in entry.tensors}
    plan = plan_of(entry.attached_files[ADAPTER_CONFIG_NAME], stored, location=entry.uri)
    _check_fit(plan, tensors, checkpoint)
    found = _described(plan, entry.uri, revision=entry.index.revision, file_bytes=entry.index.weight_bytes)
    found.far = True
    return found


def refuse_adapter(entry: CatalogEntry) -> None:
    """Refuse to call an adapter a model.

    Raises:
        CheckpointInvalid: It is one; the message says how it is deployed.
    """
    if entry.index.layout == ADAPTER_LAYOUT:
        plan = plan_of(
            entry.attached_files[ADAPTER_CONFIG_NAME],
            {tensor.name: tensor for tensor in entry.tensors},
            location=entry.uri,
        )
        raise CheckpointInvalid(
            f"{entry.uri} is a LoRA adapter of {plan.base_model or 'a model that it does not name'}, no "
            f"model: deploy its base, with --adapter NAME={entry.uri}",
            param="checkpoint_uri",
        )


def _check_fit(adapter: LoraPlan, tensors: Mapping[str, TensorRecord], checkpoint: str) -> None:
    faults = {module: _fault(module, pair, tensors) for module, pair in adapter.pairs.items()}
    wrong = [f"{module} ({fault})" for module, fault in faults.items() if fault]
    if wrong:
        more = f" and {len(wrong) - _SHOWN_MODULES} more" if len(wrong) > _SHOWN_MODULES else ""
        raise CheckpointInvalid(
            f"{adapter.location} is no adapter for {checkpoint}: {', '.join(wrong[:_SHOWN_MODULES])}{more}; "
            f"it was trained on {adapter.base_model or 'a model that it does not name'}",
            param="adapters",
        )


def _described(plan: LoraPlan, uri: str, *, revision: str, file_bytes: int) -> model_pb2.AdapterSpec:
    return model_pb2.AdapterSpec(
        uri=uri, revision=revision, file_bytes=file_bytes, rank=plan.rank, target_modules=plan.target_names
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
