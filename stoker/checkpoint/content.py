"""Plan what a checkpoint's folder will hold, and write it: shared by conversions and saved models."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stoker.checkpoint import digests, manifest
from stoker.checkpoint.cuts import Cut, deal
from stoker.checkpoint.dtypes import CASTABLE, tensor_bytes
from stoker.checkpoint.execution_order import execution_order
from stoker.checkpoint.file_writer import write_small, write_weights
from stoker.checkpoint.layout import CHUNK_BYTES, CONFIG_NAME, weights_names
from stoker.checkpoint.model_facts import read_facts
from stoker.checkpoint.plan import FilePlan, PlannedTensor, plan_file
from stoker.checkpoint.tensor_source import TensorSource
from stoker.checkpoint.ties import tied_groups
from stoker.errors import CheckpointInvalid
from stoker.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from pathlib import Path

DTYPES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What floating tensors can be cast to, by torch's names."""

_MANIFEST_ROOM_BYTES = MIB
"""What `stoker.json` and file system blocks may need beside the counted files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Content:
    """What will be in the folder, known before weights are read.

    Attributes:
        plan: Of each rank's file: they differ in their bytes only.
        whole: The tensors before they are cut, by name.
        layers: The decoder layer of each stored tensor.
        tied: Names that share a stored tensor, the stored one first.
        small: Content of the small files, by name.
        target: What floating tensors are cast to, a key of `CASTABLE`; None keeps them.
        ranks: Tensor-parallel ranks.
        cuts: By tensor; the others are stored whole for every rank.
    """

    plan: FilePlan
    whole: Mapping[str, PlannedTensor]
    layers: dict[str, int | None]
    tied: tuple[tuple[str, ...], ...]
    small: dict[str, bytes]
    target: str | None
    ranks: int
    cuts: Mapping[str, Cut]

    @property
    def need_bytes(self) -> int:
        """Disk space that the folder takes, rounded up."""
        table_bytes = 400 * len(self.layers) * self.ranks
        small_bytes = sum(len(data) for data in self.small.values())
        return self.plan.size_bytes * self.ranks + small_bytes + table_bytes + _MANIFEST_ROOM_BYTES


def plan_content(
    source: TensorSource,
    *,
    where: str,
    target: str | None = None,
    ranks: int = 1,
    cut_plan: Callable[[Mapping[str, PlannedTensor], bytes], Mapping[str, Cut]] | None = None,
) -> Content:
    """Decide what is stored, in which order and how it is cut.

    Args:
        source: What to store.
        where: What it is, for messages.
        target: What to cast floating tensors to, a key of `CASTABLE`; None keeps them.
        ranks: Tensor-parallel ranks.
        cut_plan: Says which of the tensors that will be stored are cut, given them and the text of
            `config.json`; asked for more than one rank.

    Raises:
        CheckpointInvalid: There is no `config.json`, or a tensor cannot be cast.
    """
    small = source.small_files()
    if CONFIG_NAME not in small:
        raise CheckpointInvalid(f"{where} has no {CONFIG_NAME}; fetch the checkpoint again, completely.")
    facts = read_facts(small[CONFIG_NAME], where=f"{where}/{CONFIG_NAME}")
    found = tied_groups(
        source.tensors,
        ties_embeddings=facts.ties_embeddings,
        default_ties=lambda: _architecture_ties(small[CONFIG_NAME], facts.model_type),
        same_bytes=lambda one, other: _same_bytes(source, one, other),
    )
    left_out = {name for group in found for name in group[1:]}
    order = execution_order(source.tensors.keys() - left_out)
    whole = {placed.name: _as_stored(source.tensors[placed.name], target) for placed in order}
    cuts = cut_plan(whole, small[CONFIG_NAME]) if cut_plan is not None and ranks > 1 else {}
    return Content(
        plan=plan_file([_piece(tensor, cuts.get(name), ranks) for name, tensor in whole.items()]),
        whole=whole,
        layers={placed.name: placed.layer for placed in order},
        tied=source.tied_groups + found,
        small=small if target is None else {**small, CONFIG_NAME: with_dtype(small[CONFIG_NAME], target)},
        target=target,
        ranks=ranks,
        cuts=cuts,
    )


def write_content(
    folder: Path,
    content: Content,
    source: TensorSource,
    *,
    origin: manifest.Source,
    progress: Callable[[int, int], None],
) -> manifest.Manifest:
    """Write everything but `stoker.json` into an empty folder and return what belongs into it; blocks.

    Raises:
        CheckpointInvalid: The source gave other bytes than it said.
        OSError: The disk refused.
    """
    names = weights_names(content.ranks)
    chunk_digests = write_weights(
        [folder / name for name in names],
        content.plan,
        lambda name: _pieces(source, content, name),
        chunk_bytes=CHUNK_BYTES,
        progress=progress,
    )
    for name, data in content.small.items():
        write_small(folder / name, data)
    weights = tuple(
        manifest.WeightsFile(name=name, size_bytes=content.plan.size_bytes, chunk_digests=each)
        for name, each in zip(names, chunk_digests, strict=True)
    )
    small = tuple(
        manifest.SmallFile(name=name, size_bytes=len(data), digest=digests.digest(data))
        for name, data in sorted(content.small.items())
    )
    cuts = tuple(
        manifest.TensorCut(name=name, dim=cut.dim, blocks=cut.blocks)
        for name, cut in sorted(content.cuts.items())
    )
    return manifest.Manifest(
        revision=manifest.content_revision(
            files=weights,
            small_files=small,
            tied_groups=content.tied,
            chunk_bytes=CHUNK_BYTES,
            cuts=cuts,
        ),
        chunk_bytes=CHUNK_BYTES,
        files=weights,
        tensors=tuple(record for name in names for record in _records(content, name)),
        tied_groups=content.tied,
        small_files=small,
        source=origin,
        ranks=content.ranks,
        cuts=cuts,
    )


def _piece(tensor: PlannedTensor, cut: Cut | None, ranks: int) -> PlannedTensor:
    if cut is None:
        return tensor
    return PlannedTensor(
        name=tensor.name,
        dtype=tensor.dtype,
        shape=cut.piece_shape(tensor.shape, ranks),
        nbytes=tensor.nbytes // ranks,
    )


def _pieces(source: TensorSource, content: Content, name: str) -> Iterator[tuple[int | None, memoryview]]:
    """Yield a tensor's bytes as they are stored, each with the rank that gets them."""
    parts = _cast_parts(source, content, name)
    cut = content.cuts.get(name)
    if cut is None:
        for part in parts:
            yield None, part
        return
    tensor = content.whole[name]
    unit_bytes = cut.unit_bytes(tensor.shape, tensor.dtype, content.ranks)
    if unit_bytes is None:
        raise CheckpointInvalid(
            f"Tensor {name!r}: a piece of {tensor.dtype} {list(tensor.shape)} would end inside a byte; "
            "convert with fewer ranks."
        )
    yield from deal(parts, unit_bytes=unit_bytes, ranks=content.ranks)


def _cast_parts(source: TensorSource, content: Content, name: str) -> Iterator[memoryview]:
    stored, target = source.tensors[name].dtype, content.target
    parts = source.read(name)
    if target is None or stored not in CASTABLE or stored == target:
        return parts
    from stoker.checkpoint.tensor_bytes import cast  # noqa: PLC0415 - imports torch

    return cast(parts, source=stored, target=target)


def _records(content: Content, file: str) -> Iterator[manifest.TensorRecord]:
    for entry in content.plan.entries:
        if not entry.is_filler:
            yield manifest.TensorRecord(
                name=entry.tensor.name,
                dtype=entry.tensor.dtype,
                shape=entry.tensor.shape,
                file=file,
                offset=entry.offset,
                nbytes=entry.tensor.nbytes,
                layer=content.layers[entry.tensor.name],
            )


def _as_stored(tensor: PlannedTensor, target: str | None) -> PlannedTensor:
    if target is None or tensor.dtype not in CASTABLE:
        return tensor
    nbytes = tensor_bytes(target, tensor.shape)
    if nbytes is None:
        raise CheckpointInvalid(f"Tensor {tensor.name!r} is too large to cast to {target}.")
    return PlannedTensor(name=tensor.name, dtype=target, shape=tensor.shape, nbytes=nbytes)


def _same_bytes(source: TensorSource, one: str, other: str) -> bool:
    if any(one in group and other in group for group in source.shared_groups):
        return True
    return _tensor_digest(source, one) == _tensor_digest(source, other)


def _tensor_digest(source: TensorSource, name: str) -> str:
    state = digests.Digest()
    for part in source.read(name):
        state.update(part)
    return state.hex()


def _architecture_ties(config_text: bytes, model_type: str | None) -> bool:
    """Ask transformers, where it is installed, whether this architecture ties its embeddings by default."""
    try:
        from transformers import AutoConfig  # noqa: PLC0415 - heavy, and optional

        config = json.loads(config_text)
        fields = {key: value for key, value in config.items() if key not in {"model_type", "auto_map"}}
        built = AutoConfig.for_model(model_type or "", **fields)
        return bool(getattr(built.get_text_config(), "tie_word_embeddings", False))
    except (ImportError, ValueError, TypeError, KeyError, AttributeError):
        return False


def with_dtype(config_text: bytes, target: str) -> bytes:
    """Return `config.json` saying what the tensors now are, so that `from_pretrained` does not cast back."""
    torch_name = next(name for name, dtype in DTYPES.items() if dtype == target)
    config = json.loads(config_text)
    for scope in (config, *(value for value in config.values() if isinstance(value, dict))):
        for key in ("dtype", "torch_dtype"):
            if key in scope:
                scope[key] = torch_name
    if "dtype" not in config and "torch_dtype" not in config:
        config["dtype"] = torch_name
    return json.dumps(config, indent=2, ensure_ascii=False).encode() + b"\n"
