"""Write a checkpoint's folder so that it exists whole or not at all."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stoker.checkpoint import manifest, staging
from stoker.checkpoint.content import Content, write_content
from stoker.checkpoint.file_writer import write_small
from stoker.checkpoint.layout import MANIFEST_NAME

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stoker.checkpoint.tensor_source import TensorSource


def publish(  # noqa: PLR0913 - the one place where everything meets
    source: TensorSource,
    content: Content,
    destination: Path,
    *,
    origin: manifest.Source,
    replace: bool,
    progress: Callable[[int, int], None] | None = None,
    check_source: Callable[[], None] | None = None,
) -> None:
    """Write a planned checkpoint to `destination`, whose parent exists; blocks.

    Args:
        source: Whose tensors are written.
        content: What `plan_content` made of it.
        destination: The folder to create.
        origin: Where it came from.
        replace: Whether a checkpoint at the destination may be replaced.
        progress: Called often with the bytes of weights written and the bytes to write.
        check_source: Called when all is written and before it appears; raises where the source moved.

    Raises:
        DiskFull: There is not enough space; the message says how much is needed.
        InvalidRequest: The destination cannot be written.
        AlreadyExists: Something is at the destination and may not be replaced.
        CheckpointInvalid: The source gave other bytes than it said.
    """
    staging.check_space(destination.parent, need_bytes=content.need_bytes, destination=destination)
    with (
        staging.refusals_named(destination, need_bytes=content.need_bytes),
        staging.StagedFolder(destination) as staged,
    ):
        written = write_content(
            staged.path, content, source, origin=origin, progress=progress or (lambda _done, _total: None)
        )
        if check_source is not None:
            check_source()
        write_small(staged.path / MANIFEST_NAME, manifest.render(written))
        staged.publish(replace=replace)
