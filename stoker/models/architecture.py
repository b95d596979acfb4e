"""From the text of a `config.json` to transformers' config and model class. Nothing that it brings is run."""

from __future__ import annotations

import json
from typing import Any

import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from stoker.checkpoint.layout import CONFIG_NAME
from stoker.errors import CheckpointInvalid


def config_of(text: bytes | None, location: str) -> Any:
    """Return the config that the text of a `config.json` describes.

    Args:
        text: None where there is no such file.
        location: Of the checkpoint, for messages.

    Raises:
        CheckpointInvalid: It describes no model of transformers.
    """
    if text is None:
        raise CheckpointInvalid(f"{location} has no {CONFIG_NAME}; it is needed to build the model")
    try:
        fields = json.loads(text)
    except ValueError as error:
        raise CheckpointInvalid(f"{location}/{CONFIG_NAME} is not JSON: {error}") from error
    model_type = fields.get("model_type") if isinstance(fields, dict) else None
    if model_type not in CONFIG_MAPPING:
        own_code = isinstance(fields, dict) and "auto_map" in fields
        why = "needs code of its own, which Stoker never runs" if own_code else "names no model_type known"
        raise CheckpointInvalid(
            f"{location}/{CONFIG_NAME} {why} (model_type {model_type!r}, transformers "
            f"{transformers.__version__}); take its tensors with stoker.load_tensors, or upgrade transformers"
        )
    try:
        return CONFIG_MAPPING[model_type].from_dict(fields)
    except Exception as error:  # validators of many model types raise many kinds
        raise CheckpointInvalid(f"{location}/{CONFIG_NAME} is not valid: {error}") from error


def class_of(config: Any, location: str) -> Any:
    """Return transformers' model class that a config names first.

    Raises:
        CheckpointInvalid: It names none.
    """
    architecture = str(next(iter(config.architectures or ()), ""))
    found = getattr(transformers, architecture, None) if architecture.isidentifier() else None
    if not (isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)):
        raise CheckpointInvalid(
            f"{location}/{CONFIG_NAME} names the architecture {architecture!r}, which is no model of "
            f"transformers {transformers.__version__}; take its tensors with stoker.load_tensors, "
            "or upgrade transformers"
        )
    return found
