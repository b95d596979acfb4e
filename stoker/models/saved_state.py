"""What of a transformers model is saved: state by the names that `from_pretrained` reads, and configs."""

from __future__ import annotations

import copy
import json
import re
from typing import TYPE_CHECKING, Any

import transformers
from transformers.core_model_loading import revert_weight_conversion

from stoker.checkpoint.layout import CONFIG_NAME
from stoker.errors import InvalidRequest

if TYPE_CHECKING:
    import torch


def saved_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the tensors to save, as `save_pretrained` names them; none is copied but where names convert.

    Raises:
        InvalidRequest: It is no model of transformers, or a quantised one.
    """
    if not isinstance(model, transformers.PreTrainedModel):
        raise InvalidRequest(
            f"{type(model).__name__} is no transformers model; give model.state_dict() and a config"
        )
    if getattr(model, "hf_quantizer", None) is not None:
        raise InvalidRequest("the model is quantised; save it with its own save_pretrained")
    state: dict[str, torch.Tensor] = model.state_dict()
    ignored = tuple(model._keys_to_ignore_on_save or ())  # noqa: SLF001 - transformers' own list
    state = {
        name: tensor for name, tensor in state.items() if not any(re.search(each, name) for each in ignored)
    }
    reverted: dict[str, torch.Tensor] = revert_weight_conversion(model, state)
    return reverted


def saved_configs(model: Any) -> dict[str, bytes]:
    """Return `config.json` and, for a model that generates, `generation_config.json`."""
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    config.dtype = str(model.dtype).removeprefix("torch.")
    found = {CONFIG_NAME: config.to_json_string(use_diff=True).encode()}
    if model.can_generate():
        found["generation_config.json"] = _json(model.generation_config.to_diff_dict())
    return found


def _json(fields: dict[str, Any]) -> bytes:
    return json.dumps(fields, indent=2, sort_keys=True).encode() + b"\n"
