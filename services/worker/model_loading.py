"""From a `config.json` and named tensors to a transformers model that runs on them without a copy.

Three steps, so that the first can run while weights are still on their way:

1. `build_skeleton`: modules without weights (on the meta device), small computed buffers made for real.
2. `assign_weights`: the tensors become the modules' parameters as they are; names, shapes and ties checked.
3. `wait_for_layers`: while the tail of the weights is still being read, each decoder layer's first forward
   pass waits for its own; after one complete pass nothing waits any more.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import nn
from transformers import initialization
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from services.worker.attention import ATTENTION_NAME, register_attention
from stoker.errors import CheckpointInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

FILLER_PREFIX = "__stoker_pad__."
"""Tensors of this name only fill gaps in the file (DESIGN, section 3)."""

SUPPORTED_LAYER_TYPES = frozenset({"full_attention", "sliding_attention"})
BATCH_DEPENDENT_ROPES = frozenset({"dynamic", "longrope"})
"""Rotary variants whose frequencies follow the longest session of a batch."""

POPULAR_ARCHITECTURES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "MistralForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Phi3ForCausalLM",
    "GPT2LMHeadModel",
)
"""Imported before a worker has a model, for transformers imports their modules at first use: 40 to 200 ms."""

_SHOWN_NAMES = 5


@dataclass(slots=True, kw_only=True)
class Skeleton:
    """A model without weights."""

    model: Any
    """A transformers `PreTrainedModel`; its parameters are on the meta device."""
    architecture: str
    tied: dict[str, str]
    """Parameter name → name of the parameter it is the same as."""


@cache
def supported_architectures() -> frozenset[str]:
    """Return the class names of transformers' causal language models, e.g. `LlamaForCausalLM`."""
    names: set[str] = set()
    for value in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update((value,) if isinstance(value, str) else value)
    return frozenset(names)


def import_popular_architectures() -> None:
    """Import the model classes that a load is likely to ask for; others cost their import when they come."""
    for name in POPULAR_ARCHITECTURES:
        getattr(transformers, name)


def build_skeleton(config_json: Mapping[str, Any], *, device: torch.device | None = None) -> Skeleton:
    """Build the modules that a `config.json` describes, without weights.

    Args:
        config_json: The file's content.
        device: Where the model will run: where computed buffers go. None is the CPU.

    Raises:
        CheckpointInvalid: The architecture is unknown, or needs something this engine doesn't have.
    """
    register_attention()
    architecture, model_class, config = _resolve(config_json)
    _refuse_unsupported(architecture, model_class, config)
    config._attn_implementation = ATTENTION_NAME  # noqa: SLF001 - transformers gives it no other name
    config.use_cache = False
    try:
        with torch.device("meta"), initialization.no_init_weights():
            model = model_class(config)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        raise CheckpointInvalid(f"config.json doesn't describe a {architecture}: {error}") from error
    _materialise_buffers(model, device or torch.device("cpu"))
    for module in model.modules():
        module.__dict__["training"] = False  # what eval() does, ten times as fast
    return Skeleton(model=model, architecture=architecture, tied=dict(model.all_tied_weights_keys))


def assign_weights(skeleton: Skeleton, tensors: Mapping[str, torch.Tensor]) -> nn.Module:
    """Make `tensors` the parameters of the skeleton and return the model, ready to run.

    Tensors are used as they are: on the CPU the model computes from the caller's memory. Only where their
    dtypes differ are the rarer ones cast. Where names need transformers' conversions (fused experts, renamed
    parts), transformers' own loader is used, which copies.

    Args:
        skeleton: Used up by this call.
        tensors: By their names in the checkpoint; fillers are ignored. On the device the model runs on.

    Raises:
        CheckpointInvalid: Tensors are missing, left over, or of another shape than config.json says.
    """
    given = {name: tensor for name, tensor in tensors.items() if not name.startswith(FILLER_PREFIX)}
    dtype = _dominant_dtype(given.values())
    expected = skeleton.model.state_dict(keep_vars=True)
    named, missing, unexpected = _match(skeleton, expected, given)
    if missing or unexpected:
        return _load_by_transformers(skeleton, given, dtype, missing, unexpected)
    _check_shapes(skeleton.architecture, expected, named)
    modules = dict(skeleton.model.named_modules())
    for name, tensor in named.items():
        owner, _, leaf = name.rpartition(".")
        value = tensor if tensor.dtype == dtype or not tensor.is_floating_point() else tensor.to(dtype)
        if leaf in modules[owner]._parameters:  # noqa: SLF001 - setattr would cost 10 µs for each of 272
            modules[owner]._parameters[leaf] = nn.Parameter(value, requires_grad=False)  # noqa: SLF001 - as above
        else:
            modules[owner]._buffers[leaf] = value  # noqa: SLF001 - as above
    _tie(skeleton, modules, named)
    skeleton.model.config.dtype = dtype
    return skeleton.model  # type: ignore[no-any-return]


def wait_for_layers(model: nn.Module, wait_for: Callable[[int | None], None]) -> None:
    """Make the model's first forward pass wait for weights just before it needs them.

    Args:
        model: From `assign_weights`.
        wait_for: Called with i before decoder layer i runs (0 also before the embedding): must return when
            all tensors up to that layer, in execution order, are there. Called with None before the rest
            (final norm, head): all tensors. May raise, which ends the pass.
    """
    handles: list[torch.utils.hooks.RemovableHandle] = []

    def before(index: int | None) -> Callable[[nn.Module, Any], None]:
        return lambda _module, _arguments: wait_for(index)

    def done(_module: nn.Module, _arguments: Any, _output: Any) -> None:
        wait_for(None)
        for handle in handles:
            handle.remove()

    layers = decoder_layers(model)
    base: nn.Module = model.base_model  # type: ignore[assignment]
    handles.append(base.register_forward_pre_hook(before(0)))
    handles.extend(layer.register_forward_pre_hook(before(i)) for i, layer in enumerate(layers))
    # The final norm is small and close to the last layer, the head often tied: one wait for both is enough.
    handles.append(layers[-1].register_forward_hook(done))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """Return the model's stack of decoder layers.

    Raises:
        CheckpointInvalid: There is no such stack.
    """
    count = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr,operator]
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return module
    raise CheckpointInvalid(f"{type(model).__name__} has no list of {count} decoder layers")


def _resolve(config_json: Mapping[str, Any]) -> tuple[str, Any, Any]:
    """Return architecture, model class and config."""
    names = config_json.get("architectures") or []
    architecture = str(names[0]) if names else "no architecture"
    if architecture not in supported_architectures():
        raise CheckpointInvalid(
            f"config.json names {architecture}, which is not a causal language model of transformers "
            f"{transformers.__version__}; serve another checkpoint or a newer transformers"
        )
    model_type = str(config_json.get("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise CheckpointInvalid(f"config.json of {architecture} names the unknown model_type {model_type!r}")
    try:
        config = CONFIG_MAPPING[model_type].from_dict(dict(config_json))
    except Exception as error:  # validators of many model types raise many kinds
        raise CheckpointInvalid(f"config.json of {architecture} is not valid: {error}") from error
    return architecture, getattr(transformers, architecture), config


def _refuse_unsupported(architecture: str, model_class: Any, config: Any) -> None:
    text = config.get_text_config()
    rope = getattr(text, "rope_parameters", None) or {}
    rope_types = {rope.get("rope_type")} | {v.get("rope_type") for v in rope.values() if isinstance(v, dict)}
    reasons = {
        "it doesn't use transformers' attention interface": not model_class._supports_attention_backend,  # noqa: SLF001 - transformers' only sign
        "it keeps recurrent state instead of keys and values": getattr(model_class, "_is_stateful", False),
        "it has an encoder": bool(getattr(config, "is_encoder_decoder", False)),
        "its layers share keys and values": bool(getattr(text, "num_kv_shared_layers", 0)),
        "its weights are quantised": getattr(config, "quantization_config", None) is not None,
        "it has layers that are neither full nor sliding attention": not (
            set(getattr(text, "layer_types", None) or ()) <= SUPPORTED_LAYER_TYPES
        ),
        "its rotary embedding depends on the batch": bool(rope_types & BATCH_DEPENDENT_ROPES),
    }
    for reason, holds in reasons.items():
        if holds:
            raise CheckpointInvalid(f"{architecture} can't be served by this engine: {reason}")


def _materialise_buffers(model: Any, device: torch.device) -> None:
    """Compute the buffers that no checkpoint holds (rotary frequencies), on `device`."""
    owners: dict[str, nn.Module] = {}
    for name, buffer in list(model.named_non_persistent_buffers()):
        owner, _, leaf = name.rpartition(".")
        owners[owner] = model.get_submodule(owner)
        owners[owner]._buffers[leaf] = torch.empty_like(buffer, device=device)  # noqa: SLF001 - in place of a meta tensor
    with torch.no_grad():
        for owner_module in owners.values():
            model._init_weights(owner_module)  # noqa: SLF001 - how transformers itself computes them


def _dominant_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors:
        if tensor.is_floating_point():
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.numel()
    if not sizes:
        raise CheckpointInvalid("the checkpoint holds no floating point tensors; nothing can run on it")
    return max(sizes, key=lambda dtype: sizes[dtype])


def _match(
    skeleton: Skeleton, expected: Mapping[str, torch.Tensor], given: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str], list[str]]:
    """Return tensors by the model's names, names without a tensor, and tensors without a place."""
    prefix = f"{skeleton.model.base_model_prefix}."
    named: dict[str, torch.Tensor] = {}
    unexpected = []
    for name, tensor in given.items():
        if name in expected:
            named[name] = tensor
        elif prefix + name in expected:  # saved from the bare base model, as GPT-2 was
            named[prefix + name] = tensor
        elif not _is_ignorable(skeleton.model, name):
            unexpected.append(name)
    tied_away = {target for target, source in skeleton.tied.items() if source in named}
    tied_away |= {source for target, source in skeleton.tied.items() if target in named}
    missing = [name for name in expected if name not in named and name not in tied_away]
    return named, missing, unexpected


def _is_ignorable(model: Any, name: str) -> bool:
    """Say whether older checkpoints hold a tensor of this name that the model computes by itself."""
    if name.endswith((".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias")):
        return True
    import re  # noqa: PLC0415 - a rare path

    patterns = model._keys_to_ignore_on_load_unexpected or ()  # noqa: SLF001 - transformers' own list
    return any(re.search(pattern, name) for pattern in patterns)


def _check_shapes(
    architecture: str, expected: Mapping[str, torch.Tensor], named: Mapping[str, torch.Tensor]
) -> None:
    wrong = [
        f"{name} is {list(tensor.shape)}, not {list(expected[name].shape)}"
        for name, tensor in named.items()
        if tensor.shape != expected[name].shape
    ]
    if wrong:
        raise CheckpointInvalid(
            f"{len(wrong)} tensors of this {architecture} don't have the shape that config.json says: "
            f"{_some(wrong)}"
        )


def _tie(skeleton: Skeleton, modules: Mapping[str, nn.Module], named: Mapping[str, torch.Tensor]) -> None:
    """Give tied parameters that the checkpoint holds once (or twice) one and the same tensor."""
    for target, source in skeleton.tied.items():
        holder, needer = (source, target) if source in named else (target, source)
        owner, _, leaf = holder.rpartition(".")
        parameter = modules[owner]._parameters[leaf]  # noqa: SLF001 - see assign_weights
        if needer in named and not _is_same(named[needer], named[holder]):
            continue  # the checkpoint says otherwise than the config: both keep their own, as in transformers
        owner, _, leaf = needer.rpartition(".")
        modules[owner]._parameters[leaf] = parameter  # noqa: SLF001 - see assign_weights


def _is_same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() or torch.equal(one, other)


def _load_by_transformers(
    skeleton: Skeleton,
    given: dict[str, torch.Tensor],
    dtype: torch.dtype,
    missing: list[str],
    unexpected: list[str],
) -> nn.Module:
    """Load through transformers, which converts names and layouts; the tensors are copied where it must."""
    config = skeleton.model.config
    problem = (
        f"the checkpoint doesn't fit {skeleton.architecture}: missing {_some(missing)}; "
        f"not expected {_some(unexpected)}"
    )
    if not transformers.conversion_mapping.get_model_conversion_mapping(skeleton.model):
        raise CheckpointInvalid(problem)
    try:
        model, info = type(skeleton.model).from_pretrained(
            None,
            config=config,
            state_dict=given,
            dtype=dtype,
            attn_implementation=ATTENTION_NAME,
            output_loading_info=True,
        )
    except (RuntimeError, ValueError, KeyError) as error:
        raise CheckpointInvalid(f"{problem}; transformers says: {error}") from error
    if info["missing_keys"] or info["mismatched_keys"] or info["unexpected_keys"]:
        raise CheckpointInvalid(problem)
    return model.eval()  # type: ignore[no-any-return]


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN_NAMES]) or "nothing"
    return f"{shown} and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else shown
