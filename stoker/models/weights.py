"""Named tensors become the parameters of a skeleton as they are: no copy where names and dtypes fit.

Needs torch and transformers.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import conversion_mapping

from stoker.checkpoint.layout import is_padding
from stoker.errors import CheckpointInvalid

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from stoker.models.skeleton import Skeleton

_SHOWN_NAMES = 5


def assign_weights(
    skeleton: Skeleton,
    tensors: Mapping[str, torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    keep_float32: re.Pattern[str] | None = None,
    before_reading: Callable[[], object] = lambda: None,
) -> nn.Module:
    """Make `tensors` the parameters of the skeleton and return the model, ready to run.

    Tensors are used as they are: on the CPU the model computes from the caller's memory. Only floating ones
    of another dtype than the model's are cast. Where names need transformers' conversions (fused experts,
    renamed parts), transformers' own loader is used, which copies.

    Args:
        skeleton: Used up by this call.
        tensors: By their names in the checkpoint; fillers are ignored. On the device the model runs on.
        dtype: The model's; None is the one that most elements have.
        keep_float32: Names of parameters that the model computes with in float32 whatever its dtype.
        before_reading: Called before the content of a tensor is looked at, which only casts, conversions and
            ties that the checkpoint stores twice need: where content may arrive later, wait for all of it.

    Raises:
        CheckpointInvalid: Tensors are missing, left over, or of another shape than config.json says.
    """
    given = {name: tensor for name, tensor in tensors.items() if not is_padding(name)}
    dtype = dtype or dominant_dtype(given.values())
    expected = skeleton.model.state_dict(keep_vars=True)
    named, missing, unexpected = _match(skeleton, expected, given)
    if missing or unexpected:
        before_reading()
        return _load_by_transformers(skeleton, given, dtype, missing, unexpected)
    _check_shapes(skeleton.architecture, expected, named)
    modules = dict(skeleton.model.named_modules())
    wanted = {name: dtype for name, tensor in named.items() if tensor.is_floating_point()}
    if keep_float32 is not None:
        wanted.update((name, torch.float32) for name in wanted if keep_float32.search(name))
    if any(named[name].dtype != each for name, each in wanted.items()):
        before_reading()
    for name, tensor in named.items():
        owner, _, leaf = name.rpartition(".")
        value = tensor.to(wanted.get(name, tensor.dtype))  # the tensor itself where nothing changes
        if leaf in modules[owner]._parameters:  # noqa: SLF001 - setattr would cost 10 µs for each of 272
            modules[owner]._parameters[leaf] = nn.Parameter(value, requires_grad=False)  # noqa: SLF001 - as above
        else:
            modules[owner]._buffers[leaf] = value  # noqa: SLF001 - as above
    _tie(skeleton, modules, named, before_reading)
    skeleton.model.config.dtype = dtype
    return skeleton.model  # type: ignore[no-any-return]


def dominant_dtype(tensors: Iterable[torch.Tensor]) -> torch.dtype:
    """Return the floating point dtype that most elements have; what a model made of these computes in.

    Raises:
        CheckpointInvalid: There are no floating point tensors.
    """
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


def _tie(
    skeleton: Skeleton,
    modules: Mapping[str, nn.Module],
    named: Mapping[str, torch.Tensor],
    before_reading: Callable[[], object],
) -> None:
    """Give tied parameters that the checkpoint holds once (or twice) one and the same tensor."""
    for target, source in skeleton.tied.items():
        holder, needer = (source, target) if source in named else (target, source)
        owner, _, leaf = holder.rpartition(".")
        parameter = modules[owner]._parameters[leaf]  # noqa: SLF001 - see assign_weights
        if needer in named and not _is_same(named[needer], named[holder], before_reading):
            continue  # the checkpoint says otherwise than the config: both keep their own, as in transformers
        owner, _, leaf = needer.rpartition(".")
        modules[owner]._parameters[leaf] = parameter  # noqa: SLF001 - see assign_weights


def _is_same(one: torch.Tensor, other: torch.Tensor, before_reading: Callable[[], object]) -> bool:
    if one.data_ptr() == other.data_ptr():
        return True
    before_reading()
    return torch.equal(one, other)


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
    if not conversion_mapping.get_model_conversion_mapping(skeleton.model):
        raise CheckpointInvalid(problem)
    try:
        model, info = type(skeleton.model).from_pretrained(
            None,
            config=config,
            state_dict=given,
            dtype=dtype,
            attn_implementation=config._attn_implementation,  # noqa: SLF001 - transformers gives it no other name
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
