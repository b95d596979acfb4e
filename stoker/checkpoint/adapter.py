"""LoRA adapters in PEFT's format: `adapter_config.json` beside `adapter_model.safetensors`. Needs no torch.

An adapter adds to the output of a linear module, whose weight W stays as it is,
`scale · B A x` with A `[rank, in]` and B `[out, rank]` (LoRA, arXiv:2106.09685, section 4.1); `scale` is
`alpha / rank`, or `alpha / √rank` where the config says rank-stabilised (arXiv:2312.03732). Everything that
would change the result and that this module does not do is refused by name, never left out.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from stoker.checkpoint import digests, hostile_json
from stoker.checkpoint.folder import read_bounded, resolve_file, resolve_folder
from stoker.checkpoint.index import CheckpointFile, CheckpointIndex, read_header, with_layers
from stoker.checkpoint.layout import (
    ADAPTER_CONFIG_NAME,
    ADAPTER_LAYOUT,
    ADAPTER_WEIGHTS_NAME,
    CHUNK_BYTES,
    CONFIG_NAME,
)
from stoker.checkpoint.manifest import TensorRecord
from stoker.checkpoint.model_facts import NO_FACTS
from stoker.checkpoint.safetensors_header import TensorEntry
from stoker.errors import CheckpointInvalid, NotFound
from stoker.ids import Revision

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

MAX_ADAPTER_CONFIG_BYTES = 1024 * 1024
MAX_RANK = 4096

_NAME = re.compile(r"(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.[^.]+)?\.weight")
_FLOATS = frozenset({"F64", "F32", "F16", "BF16"})
_MATRIX = 2
_SHOWN_NAMES = 3

_MUST_BE = {
    "use_dora": (False, "DoRA rescales the base's weights"),
    "modules_to_save": ((), "it replaces whole modules"),
    "layer_replication": ((), "it repeats the base's layers"),
    "megatron_config": ((), "it is made for Megatron's parallel modules"),
    "use_bdlora": ((), "its matrices are block-diagonal"),
    "trainable_token_indices": ((), "it replaces rows of the embedding"),
    "target_parameters": ((), "it changes parameters that are no linear module's weight"),
    "lora_bias": (False, "it adds biases"),
    "arrow_config": ((), "it chooses among several adapters for each token"),
    "alora_invocation_tokens": ((), "it starts in the middle of a prompt"),
}
"""Fields that must have this value (or be absent, or null) and what another one means."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPair:
    """The two matrices of one module.

    Attributes:
        a: Name of A, `[rank, in]`, in the file.
        b: Name of B, `[out, rank]`.
        rank: Of the change.
        scale: What `B A x` is multiplied by.
        in_features: Width of the module's input.
        out_features: Width of its output.
    """

    a: str
    b: str
    rank: int
    scale: float
    in_features: int
    out_features: int


class Matrix(Protocol):
    """What is known of a stored tensor."""

    @property
    def dtype(self) -> str:
        """Return safetensors' name of it."""
        ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the element counts."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraPlan:
    """What an adapter does, checked; its bytes are elsewhere.

    Attributes:
        location: Its folder, or the uri it comes from.
        base_model: What it was trained on, as its config says; not checked.
        pairs: By the module's name in the base model, e.g. `model.layers.0.self_attn.q_proj`.
    """

    location: str
    base_model: str
    pairs: Mapping[str, LoraPair]

    @property
    def target_names(self) -> tuple[str, ...]:
        """Return the modules' last names."""
        return tuple(sorted({name.rpartition(".")[2] for name in self.pairs}))

    @property
    def rank(self) -> int:
        """Return the highest of its matrices."""
        return max(pair.rank for pair in self.pairs.values())


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter(LoraPlan):
    """An adapter on disk, checked.

    Attributes:
        path: Its folder, links resolved.
        entries: The stored tensors by name.
        file: The weights file.
        revision: Changes when its config or the table of its tensors does, or its file's size or time.
    """

    path: Path
    entries: Mapping[str, TensorEntry]
    file: CheckpointFile
    revision: str

    @property
    def size_bytes(self) -> int:
        """Bytes of the weights file."""
        return self.file.size_bytes


def is_adapter(path: str | os.PathLike[str]) -> bool:
    """Say whether a folder holds an adapter: it has an `adapter_config.json` and no `config.json`."""
    try:
        folder = resolve_folder(path)
    except NotFound:
        return False
    return (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / CONFIG_NAME).is_file()


def open_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Return the adapter in the folder `path`; reads its config and its header, blocks for both.

    Raises:
        NotFound: There is no such folder.
        CheckpointInvalid: It is damaged, hostile, or of a kind that is not supported; the message says which.
    """
    folder = resolve_folder(path, holding=ADAPTER_CONFIG_NAME)
    config_path, weights = (
        resolve_file(folder, ADAPTER_CONFIG_NAME),
        resolve_file(folder, ADAPTER_WEIGHTS_NAME),
    )
    if config_path is None or weights is None:
        missing = ADAPTER_CONFIG_NAME if config_path is None else ADAPTER_WEIGHTS_NAME
        raise CheckpointInvalid(
            f"{folder} has no {missing}; give the folder of a LoRA adapter in PEFT's format."
        )
    text = read_bounded(config_path, limit_bytes=MAX_ADAPTER_CONFIG_BYTES)
    header, header_text, size = read_header(weights)
    entries = {entry.name: entry for entry in header.tensors}
    plan = plan_of(text, entries, location=str(folder))
    signature = [
        digests.digest(text),
        digests.digest(header_text),
        str(size),
        str(weights.stat().st_mtime_ns),
    ]
    return Adapter(
        location=plan.location,
        base_model=plan.base_model,
        pairs=plan.pairs,
        path=folder,
        entries=entries,
        file=CheckpointFile(
            name=ADAPTER_WEIGHTS_NAME,
            path=weights,
            size_bytes=size,
            data_start=header.data_start,
            chunk_digests=(),
        ),
        revision=digests.digest_of_texts(signature),
    )


def plan_of(config_text: bytes, tensors: Mapping[str, Matrix], *, location: str) -> LoraPlan:
    """Return what the adapter with this config and these tensors does; pure.

    Args:
        config_text: Of `adapter_config.json`.
        tensors: By their names in the file.
        location: Where they come from, for messages.

    Raises:
        CheckpointInvalid: It is damaged, hostile, or of a kind that is not supported; the message says which.
    """
    where = f"{location}/{ADAPTER_CONFIG_NAME}"
    config = hostile_json.parse_object(config_text, where=where)
    _refuse_unsupported(config, where)
    return LoraPlan(
        location=location,
        base_model=str(config.get("base_model_name_or_path") or ""),
        pairs=_pairs(tensors, config, location),
    )


def adapter_index(path: str | os.PathLike[str]) -> CheckpointIndex:
    """Return the adapter in the folder `path` as stores move it: one file of tensors, like any checkpoint.

    Raises:
        NotFound, CheckpointInvalid: As `open_adapter`.
    """
    adapter = open_adapter(path)
    start = adapter.file.data_start
    records = {
        name: TensorRecord(
            name=name,
            dtype=entry.dtype,
            shape=entry.shape,
            file=adapter.file.name,
            offset=start + entry.begin,
            nbytes=entry.nbytes,
            layer=None,
        )
        for name, entry in adapter.entries.items()
    }
    return CheckpointIndex(
        path=adapter.path,
        layout=ADAPTER_LAYOUT,
        revision=Revision(adapter.revision),
        files=(adapter.file,),
        tensors=with_layers(records),
        tied_groups=(),
        small_files=(ADAPTER_CONFIG_NAME,),
        chunk_bytes=CHUNK_BYTES,
        facts=NO_FACTS,
    )


def _refuse_unsupported(config: Mapping[str, Any], where: str) -> None:
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointInvalid(f"{where}: peft_type {str(kind)[:40]!r} is not supported; only LORA is.")
    if config.get("bias", "none") != "none":
        raise CheckpointInvalid(
            f"{where}: bias {str(config['bias'])[:40]!r} is not supported: it replaces the base's biases; "
            "train with bias='none'."
        )
    for field, (wanted, meaning) in _MUST_BE.items():
        value = config.get(field)
        if value and value != wanted:
            raise CheckpointInvalid(f"{where}: {field} is not supported: {meaning}.")


def _pairs(entries: Mapping[str, Matrix], config: Mapping[str, Any], where: str) -> dict[str, LoraPair]:
    sides: dict[str, dict[str, tuple[str, tuple[int, ...]]]] = {}
    strange = []
    for name, entry in entries.items():
        match = _NAME.fullmatch(name)
        if (
            match is None
            or len(entry.shape) != _MATRIX
            or entry.dtype not in _FLOATS
            or match["side"] in sides.setdefault(match["module"], {})
        ):
            strange.append(name)
        else:
            sides[match["module"]][match["side"]] = name, entry.shape
    if strange:
        raise CheckpointInvalid(
            f"{where}: {len(strange)} tensors are no LoRA matrices of linear modules "
            f"({', '.join(name[:100] for name in strange[:_SHOWN_NAMES])}); embeddings and convolutions "
            "are not supported."
        )
    if not sides:
        raise CheckpointInvalid(
            f"{where}: {ADAPTER_WEIGHTS_NAME} holds no LoRA matrices; fetch the adapter again."
        )
    return {module: _pair(module, both, config, where) for module, both in sides.items()}


def _pair(
    module: str, sides: Mapping[str, tuple[str, tuple[int, ...]]], config: Mapping[str, Any], where: str
) -> LoraPair:
    if sides.keys() != {"A", "B"}:
        raise CheckpointInvalid(f"{where}: {module} has only one of lora_A and lora_B; fetch it again.")
    (a, a_shape), (b, b_shape) = sides["A"], sides["B"]
    rank = _of_module(config, module, default="r", pattern="rank_pattern", where=where)
    if not (isinstance(rank, int) and 0 < rank <= MAX_RANK) or a_shape[0] != rank or b_shape[1] != rank:
        raise CheckpointInvalid(
            f"{where}: {module} has lora_A {list(a_shape)} and lora_B {list(b_shape)}, and the config says "
            f"rank {str(rank)[:20]}; fetch the adapter again."
        )
    alpha = _of_module(config, module, default="lora_alpha", pattern="alpha_pattern", where=where)
    if not isinstance(alpha, int | float) or isinstance(alpha, bool) or not math.isfinite(alpha):
        raise CheckpointInvalid(f"{where}: lora_alpha of {module} is {str(alpha)[:20]!r}, not a number.")
    return LoraPair(
        a=a,
        b=b,
        rank=rank,
        scale=alpha / (math.sqrt(rank) if config.get("use_rslora") else rank),
        in_features=a_shape[1],
        out_features=b_shape[0],
    )


def _of_module(config: Mapping[str, Any], module: str, *, default: str, pattern: str, where: str) -> Any:
    """Return a module's own value where a pattern names it (the first wins), else the config's."""
    patterns = config.get(pattern) or {}
    if not isinstance(patterns, dict):
        raise CheckpointInvalid(f"{where}: {pattern} is not an object; fetch the adapter again.")
    for key, value in patterns.items():
        if key == module or module.endswith("." + key):
            return value
        if key.startswith("^") or not re.fullmatch(r"[\w.]+", key):
            raise CheckpointInvalid(
                f"{where}: {pattern} has the expression {key[:60]!r}; only names of modules are supported."
            )
    return config.get(default)
