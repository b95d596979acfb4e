"""Convert a checkpoint to the layout: plan, stream, digest, publish.

Order of effects: look at the source; stop where the destination already holds it; check the disk's space;
write weights and small files into a partial folder; check that the source stood still; write `stoker.json`;
rename. Whatever ends it before the rename leaves nothing that looks complete.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from stoker.checkpoint import manifest, staging
from stoker.checkpoint.content import DTYPES, plan_content
from stoker.checkpoint.index import CheckpointIndex, open_checkpoint, read_manifest
from stoker.checkpoint.layout import MANIFEST_NAME
from stoker.checkpoint.manifest import MAX_RANKS
from stoker.checkpoint.publish import publish
from stoker.checkpoint.sources import SourceFiles, find_source, open_source
from stoker.errors import AlreadyExists, CheckpointInvalid, InvalidRequest

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stoker.checkpoint.cuts import Cut
    from stoker.checkpoint.plan import PlannedTensor


def convert(  # noqa: PLR0913 - what a caller may choose
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    *,
    dtype: str | None = None,
    tensor_parallel: int = 1,
    overwrite: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> CheckpointIndex:
    """Write the checkpoint at `src` to the folder `dst` in the layout, and return its index; blocks.

    For several ranks that is the index of rank 0: `open_checkpoint(dst, rank=...)` opens the others.

    Memory is bounded by a few slices of 4 MiB for safetensors and mapped pickles; see `pickle_source` and
    `gguf_source` for what the others need.

    Args:
        src: A folder with safetensors or pickles, or a `.gguf` file.
        dst: A folder to create. One that already holds the same source in the same dtype is returned as is.
        dtype: `float32`, `bfloat16` or `float16`: cast tensors of 16-bit and wider floats; None keeps all.
            Narrower floats are quantised and stay, as do integers and complex numbers.
        tensor_parallel: Ranks to cut the checkpoint for, one file each, by the `tp_plan` of its architecture
            (needs transformers). Tensors that the plan leaves whole are in every rank's file.
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
    if not 1 <= tensor_parallel <= MAX_RANKS:
        raise InvalidRequest(f"tensor_parallel is {tensor_parallel}; give 1 … {MAX_RANKS}.")
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
    rank = 0 if tensor_parallel > 1 else None
    if _holds(destination, source, ranks=tensor_parallel, overwrite=overwrite):
        return open_checkpoint(destination, rank=rank)
    _write(files, destination, source, target, tensor_parallel, replace=overwrite, progress=progress)
    return open_checkpoint(destination, rank=rank)


def _write(  # noqa: PLR0913 - what `convert` has found out
    files: SourceFiles,
    destination: Path,
    origin: manifest.Source,
    target: str | None,
    ranks: int,
    *,
    replace: bool,
    progress: Callable[[int, int], None] | None,
) -> None:
    """Read the source and publish it at the destination, unless the source changes meanwhile."""
    stamp = files.stamp()

    def check_unchanged() -> None:
        if files.stamp() != stamp:
            raise CheckpointInvalid(
                f"{files.location} changed while it was converted; wait until whoever writes it is done."
            )

    with staging.refusals_named(destination, need_bytes=0):
        destination.parent.mkdir(parents=True, exist_ok=True)
        staging.remove_leftovers(destination)
    with open_source(files, dtype=target) as opened:
        content = plan_content(
            opened,
            where=str(files.location),
            target=target,
            ranks=ranks,
            cut_plan=_cut_plan(files, ranks),
        )
        publish(
            opened,
            content,
            destination,
            origin=origin,
            replace=replace,
            progress=progress,
            check_source=check_unchanged,
        )


def _cut_plan(
    files: SourceFiles, ranks: int
) -> Callable[[Mapping[str, PlannedTensor], bytes], Mapping[str, Cut]]:
    def plan(tensors: Mapping[str, PlannedTensor], config_text: bytes) -> Mapping[str, Cut]:
        try:
            from stoker.models.tensor_parallel import plan_cuts  # noqa: PLC0415 - imports transformers
        except ImportError as error:
            raise InvalidRequest(
                f"Cutting a checkpoint for ranks needs a package that is not installed ({error.name}): "
                "install stoker[torch]."
            ) from error
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return plan_cuts(config_text, shapes, ranks=ranks, where=str(files.location))

    return plan


def _target_dtype(dtype: str | None) -> str | None:
    if dtype is None:
        return None
    if dtype not in DTYPES:
        raise InvalidRequest(f"Cannot cast to {dtype!r}; choose one of {', '.join(DTYPES)}.", param="dtype")
    return DTYPES[dtype]


def _holds(destination: Path, source: manifest.Source, *, ranks: int, overwrite: bool) -> bool:
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
        there = read_manifest(destination.resolve())
        found = there.source
        same = (found.fingerprint, found.dtype, there.ranks) == (source.fingerprint, source.dtype, ranks)
        if same:
            for rank in range(ranks):
                open_checkpoint(destination, rank=rank)
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
