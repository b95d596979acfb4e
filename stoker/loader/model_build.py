"""Build a transformers model for a checkpoint's tensors, as `from_pretrained` would. Imports transformers.

`build` needs the small files and the table only, so it runs while the bytes are on their way; `finish` puts
the tensors in.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers.core_model_loading import build_glob_alternation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from stoker.checkpoint.dtypes import TORCH_NAMES
from stoker.checkpoint.layout import CONFIG_NAME
from stoker.errors import CheckpointInvalid, InvalidRequest
from stoker.models.architecture import class_of, config_of
from stoker.models.skeleton import Skeleton, empty_model
from stoker.models.weights import assign_weights

if TYPE_CHECKING:
    import re
    from collections.abc import Mapping

    from stoker.loader.sources import Source

GENERATION_CONFIG_NAME = "generation_config.json"


@dataclass(frozen=True, slots=True, kw_only=True)
class Blueprint:
    """A model without weights, and what they are to become.

    Attributes:
        skeleton: Its parameters are on the meta device.
        dtype: Of the floating parameters.
        keep_float32: Names of those that stay in float32 whatever the dtype.
    """

    skeleton: Skeleton
    dtype: torch.dtype
    keep_float32: re.Pattern[str] | None


def build(  # noqa: PLR0913 - what a caller may choose
    source: Source,
    device: torch.device,
    *,
    dtype: str | torch.dtype | None,
    attn_implementation: str | None,
    config: Any,
    model_class: Any,
    name: str,
) -> Blueprint:
    """Return the model that the source's `config.json` describes, without weights.

    Args:
        source: Not necessarily received.
        device: Where computed buffers go.
        dtype: None = as stored; `auto` = as the config says; else the dtype or its name.
        attn_implementation: None lets transformers choose.
        config: Instead of the checkpoint's own; not changed.
        model_class: Instead of what the config names.
        name: What `model.name_or_path` says.

    Raises:
        CheckpointInvalid: The config describes no model of transformers, or a quantised one.
        InvalidRequest: There is no such dtype or attention.
    """
    text = source.small_file(CONFIG_NAME)
    config = (
        config_of(text, source.location) if config is None else config.__class__.from_dict(config.to_dict())
    )
    if getattr(config, "quantization_config", None) is not None:
        raise CheckpointInvalid(
            f"{source.location} is quantised: its tensors are not parameters as they are stored. Load it "
            "with transformers' from_pretrained (stoker.transformers does so by itself), or take its tensors "
            "with stoker.load_tensors"
        )
    model_class = model_class or class_of(config, source.location)
    wanted = _dtype_of(dtype, config, source)
    _check_attention(attn_implementation)
    config.name_or_path = name
    config.dtype = wanted
    if attn_implementation is not None:
        config._attn_implementation = attn_implementation  # noqa: SLF001 - transformers gives it no other name
    try:
        skeleton = empty_model(model_class, config, device=device, dtype=wanted)
    except ImportError as error:
        raise InvalidRequest(f"{source.location} cannot be built here: {error}") from error
    index = getattr(source, "index", None)
    if index is not None and index.ranks > 1:
        from stoker.loader.ranks import distribute  # noqa: PLC0415 - imports torch.distributed

        distribute(skeleton, index, text or b"")
    _add_generation_config(skeleton.model, source)
    return Blueprint(skeleton=skeleton, dtype=wanted, keep_float32=_kept_in_float32(skeleton.model, wanted))


def finish(blueprint: Blueprint, tensors: Mapping[str, torch.Tensor]) -> Any:
    """Put the tensors in and return the model, its floating parameters trainable as `from_pretrained`'s are.

    Raises:
        CheckpointInvalid: Tensors are missing, left over, or of another shape than the config says.
    """
    if getattr(blueprint.skeleton.model, "is_distributed_loading_by_transformers", False):
        from stoker.loader.ranks import as_pieces  # noqa: PLC0415 - imports torch.distributed

        tensors = as_pieces(blueprint.skeleton.model, tensors)
    model = assign_weights(
        blueprint.skeleton, tensors, dtype=blueprint.dtype, keep_float32=blueprint.keep_float32
    )
    for parameter in model.parameters():
        if parameter.is_floating_point() or parameter.is_complex():
            parameter.requires_grad_()
    return model


def _check_attention(name: str | None) -> None:
    """Refuse an attention that transformers does not have; the hub's kernels are named `owner/name`."""
    known = ("eager", *ALL_ATTENTION_FUNCTIONS.valid_keys())
    if name is not None and name not in known and "/" not in name:
        raise InvalidRequest(
            f"attn_implementation {name!r} is none of transformers' ({', '.join(sorted(known))})",
            param="attn_implementation",
        )


def _dtype_of(dtype: str | torch.dtype | None, config: Any, source: Source) -> torch.dtype:
    wanted: Any = dtype
    if wanted == "auto":
        wanted = config.dtype
    if isinstance(wanted, str):
        wanted = getattr(torch, wanted, wanted)
    if wanted is None:
        return _stored_dtype(source)
    if not (isinstance(wanted, torch.dtype) and wanted.is_floating_point):
        raise InvalidRequest(
            f"dtype {dtype!r} is no floating dtype of torch; give e.g. torch.bfloat16, 'float32', or 'auto'",
            param="dtype",
        )
    return wanted


def _stored_dtype(source: Source) -> torch.dtype:
    """Return the floating dtype that most elements have."""
    counts: dict[torch.dtype, int] = {}
    for place in source.tensors.values():
        found = getattr(torch, TORCH_NAMES.get(place.dtype, ""), None)
        if isinstance(found, torch.dtype) and found.is_floating_point:
            counts[found] = counts.get(found, 0) + place.nbytes // found.itemsize
    if not counts:
        raise CheckpointInvalid(f"{source.location} holds no floating tensors; no model can run on it")
    return max(counts, key=lambda dtype: counts[dtype])


def _kept_in_float32(model: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    plan = model._get_dtype_plan(dtype)  # noqa: SLF001 - the rules by which from_pretrained casts
    if not plan:
        return None
    pattern: re.Pattern[str] = build_glob_alternation(list(plan))[0]
    return pattern


def _add_generation_config(model: Any, source: Source) -> None:
    text = source.small_file(GENERATION_CONFIG_NAME)
    if text is None or not model.can_generate():
        return
    try:
        fields = json.loads(text)
        model.generation_config = transformers.GenerationConfig.from_dict(fields)
    except (ValueError, TypeError, AttributeError) as error:
        raise CheckpointInvalid(
            f"{source.location}/{GENERATION_CONFIG_NAME} is not valid: {error}; fetch it again"
        ) from error
