"""Convert a checkpoint to the layout: plan, stream, digest, publish.

Order of effects: look at the source; stop where the destination already holds it; check the disk's space;
write weights and small files into a partial folder; check that the source stood still; write `stoker.json`;
rename. Whatever ends it before the rename leaves nothing that looks complete.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.checkpoint import digests, manifest, staging
from stoker.checkpoint.dtypes import CASTABLE, tensor_bytes
from stoker.checkpoint.execution_order import execution_order
from stoker.checkpoint.file_writer import write_small, write_weights
from stoker.checkpoint.index import CheckpointIndex, open_checkpoint, read_manifest
from stoker.checkpoint.layout import CHUNK_BYTES, CONFIG_NAME, MANIFEST_NAME, WEIGHTS_NAME
from stoker.checkpoint.model_facts import read_facts
from stoker.checkpoint.plan import FilePlan, PlannedTensor, plan_file
from stoker.checkpoint.sources import SourceFiles, find_source, open_source
from stoker.checkpoint.tensor_source import TensorSource
from stoker.checkpoint.ties import tied_groups
from stoker.errors import AlreadyExists, CheckpointInvalid, InvalidRequest
from stoker.units import MIB

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DTYPES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""What floating tensors can be cast to, by torch's names."""

_MANIFEST_ROOM_BYTES = MIB
"""What `stoker.json` and file system blocks may need beside the counted files."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Content:
    """What will be in the folder, before weights are read."""

    plan: FilePlan
    layers: dict[str, int | None]
    tied: tuple[tuple[str, ...], ...]
    small: dict[str, bytes]

    @property
    def need_bytes(self) -> int:
        table_bytes = 400 * len(self.layers)
        small_bytes = sum(len(data) for data in self.small.values())
        return self.plan.size_bytes + small_bytes + table_bytes + _MANIFEST_ROOM_BYTES


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointIndex:
    """Write the checkpoint at `src` to the folder `dst` in the layout, and return its index; blocks.

    Memory is bounded by a few slices of 4 MiB for safetensors and mapped pickles; see `pickle_source` and
    `gguf_source` for what the others need.

    Args:
        src: A folder with safetensors or pickles, or a `.gguf` file.
        dst: A folder to create. One that already holds the same source in the same dtype is returned as is.
        dtype: `float32`, `bfloat16` or `float16`: cast tensors of 16-bit and wider floats; None keeps all.
            Narrower floats are quantised and stay, as do integers and complex numbers.
        overwrite: Whether a *converted* checkpoint at `dst` may be replaced; nothing else ever is.
        progress: Called often with the bytes of weights written and the bytes to write.

    Raises:
        NotFound: There is nothing at `src`.
        CheckpointInvalid: The source is damaged, hostile, or changed meanwhile.
        AlreadyExists: Something else is at `dst`, or another conversion is writing it.
        DiskFull: There is not enough space; the message says how much is needed.
        InvalidRequest: An argument is wrong, `dst` cannot be written, or the extra for this format is not
            installed.
    """
    target = _target_dtype(dtype)
    files = find_source(src)
    destination = Path(os.path.abspath(Path(dst).expanduser()))  # noqa: PTH100 - a link at dst stays a link
    staging.check_destination(destination)
    if destination.resolve() == files.location.resolve():
        raise InvalidRequest(f"Source and destination are both {destination}; choose another destination.")
    source = manifest.Source(
        uri=os.fsencode(files.location).decode("utf-8", "replace"),
        format=files.format,
        fingerprint=files.fingerprint(),
        dtype=dtype,
    )
    if _holds(destination, source, overwrite=overwrite):
        return open_checkpoint(destination)
    stamp = files.stamp()
    with staging.refusals_named(destination, need_bytes=0):
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging.remove_leftovers(destination)
    with open_source(files, dtype=target) as opened:
        content = _content(opened, files, target)
        staging.check_space(destination.parent, need_bytes=content.need_bytes, destination=destination)
        with (
            staging.refusals_named(destination, need_bytes=content.need_bytes),
            staging.StagedFolder(destination) as staged,
        ):
            written = _write(staged.path, content, opened, target, source, progress or _silent)
            if files.stamp() != stamp:
                raise CheckpointInvalid(
                    f"{files.location} changed while it was converted; wait until whoever writes it is done."
                )
            write_small(staged.path / MANIFEST_NAME, manifest.render(written))
            staged.publish(replace=overwrite)
    return open_checkpoint(destination)


def _target_dtype(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise InvalidRequest(f"Cannot cast to {dtype!r}; choose one of {', '.join(DTYPES)}.", param="dtype")
    return DTYPES[dtype]


def _holds(destination: Path, source: manifest.Source, *, overwrite: bool) -> bool:
    """Say whether the destination already is this conversion's result; refuse what may not be replaced."""
    if not os.path.lexists(destination):
        return False
    if destination.is_dir() and not any(destination.iterdir()):
        return False
    if not (destination / MANIFEST_NAME).is_file():
        raise AlreadyExists(
            f"{destination} exists and is not a converted checkpoint, which alone may be replaced; "
            "choose another name."
        )
    try:
        found = read_manifest(destination.resolve()).source
        same = (found.fingerprint, found.dtype) == (source.fingerprint, source.dtype)
        if same:
            open_checkpoint(destination)
            return True
    except CheckpointInvalid as error:
        if overwrite:
            return False
        raise AlreadyExists(
            f"{destination} holds a damaged checkpoint: {error.message} Give --overwrite to replace it."
        ) from error
    if overwrite:
        return False
    raise AlreadyExists(
        f"{destination} holds another checkpoint, made from {found.uri} as {found.dtype or 'it was'}; "
        "give --overwrite to replace it, or choose another name."
    )


def _content(source: TensorSource, files: SourceFiles, target: str | None) -> _Content:
    small = source.small_files()
    if CONFIG_NAME not in small:
        raise CheckpointInvalid(
            f"{files.location} has no {CONFIG_NAME}; fetch the checkpoint again, completely."
        )
    facts = read_facts(small[CONFIG_NAME], where=f"{files.location}/{CONFIG_NAME}")
    found = tied_groups(
        source.tensors,
        ties_embeddings=facts.ties_embeddings,
        default_ties=lambda: _architecture_ties(small[CONFIG_NAME], facts.model_type),
        same_bytes=lambda one, other: _same_bytes(source, one, other),
    )
    left_out = {name for group in found for name in group[1:]}
    order = execution_order(source.tensors.keys() - left_out)
    plan = plan_file([_as_stored(source.tensors[placed.name], target) for placed in order])
    return _Content(
        plan=plan,
        layers={placed.name: placed.layer for placed in order},
        tied=source.tied_groups + found,
        small=small if target is None else {**small, CONFIG_NAME: _with_dtype(small[CONFIG_NAME], target)},
    )


def _as_stored(tensor: PlannedTensor, target: str | None) -> PlannedTensor:
    if target is None or tensor.dtype not in CASTABLE:
        return tensor
    nbytes = tensor_bytes(target, tensor.shape)
    if nbytes is None:
        raise CheckpointInvalid(f"Tensor {tensor.name!r} is too large to cast to {target}.")
    return PlannedTensor(name=tensor.name, dtype=target, shape=tensor.shape, nbytes=nbytes)


def _write(  # noqa: PLR0913, PLR0917 - the one place where everything meets
    folder: Path,
    content: _Content,
    source: TensorSource,
    target: str | None,
    origin: manifest.Source,
    progress: Callable[[int, int], None],
) -> manifest.Manifest:
    """Write everything but `stoker.json` and return what belongs into it."""

    def read(name: str) -> Iterator[memoryview]:
        stored = source.tensors[name].dtype
        parts = source.read(name)
        if target is None or stored not in CASTABLE or stored == target:
            return parts
        from stoker.checkpoint.tensor_bytes import cast  # noqa: PLC0415 - imports torch

        return cast(parts, source=stored, target=target)

    chunk_digests = write_weights(
        folder / WEIGHTS_NAME, content.plan, read, chunk_bytes=CHUNK_BYTES, progress=progress
    )
    for name, data in content.small.items():
        write_small(folder / name, data)
    weights = manifest.WeightsFile(
        name=WEIGHTS_NAME, size_bytes=content.plan.size_bytes, chunk_digests=chunk_digests
    )
    small = tuple(
        manifest.SmallFile(name=name, size_bytes=len(data), digest=digests.digest(data))
        for name, data in sorted(content.small.items())
    )
    return manifest.Manifest(
        revision=manifest.content_revision(
            files=(weights,), small_files=small, tied_groups=content.tied, chunk_bytes=CHUNK_BYTES
        ),
        chunk_bytes=CHUNK_BYTES,
        files=(weights,),
        tensors=tuple(_records(content)),
        tied_groups=content.tied,
        small_files=small,
        source=origin,
    )


def _records(content: _Content) -> Iterator[manifest.TensorRecord]:
    for entry in content.plan.entries:
        if not entry.is_filler:
            yield manifest.TensorRecord(
                name=entry.tensor.name,
                dtype=entry.tensor.dtype,
                shape=entry.tensor.shape,
                file=WEIGHTS_NAME,
                offset=entry.offset,
                nbytes=entry.tensor.nbytes,
                layer=content.layers[entry.tensor.name],
            )


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


def _with_dtype(config_text: bytes, target: str) -> bytes:
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


def _silent(_done_bytes: int, _total_bytes: int) -> None:
    """Tell nobody."""
