"""Open files of a checkpoint folder that someone else filled: no way out of it, no unbounded read.

A name is one path component. Links are followed only to where they may lead: inside the folder, or, for the
Hugging Face hub's cache (`models--org--name/snapshots/<revision>/`), into the `blobs` folder beside
`snapshots`. Only regular files are opened, so that a fifo or device cannot block or flood the reader.
"""

from __future__ import annotations

import os
import re
import stat
from pathlib import Path

from stoker.checkpoint.layout import CONFIG_NAME
from stoker.errors import CheckpointInvalid, NotFound
from stoker.units import format_bytes

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)


def resolve_folder(path: str | os.PathLike[str], *, holding: str = CONFIG_NAME) -> Path:
    """Return the real path of an existing folder.

    Args:
        path: Of the folder.
        holding: A file by which it is known, for messages.

    Raises:
        NotFound: There is none.
    """
    folder = Path(path).expanduser()
    try:
        resolved = folder.resolve(strict=True)
    except (OSError, RuntimeError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise NotFound(
            f"No checkpoint at {folder}: {reason}. Give the folder that holds {holding}{hub_hint(path)}."
        ) from error
    if not resolved.is_dir():
        raise NotFound(f"{folder} is not a folder. Give the folder that holds {holding}.")
    return resolved


def hub_hint(path: str | os.PathLike[str]) -> str:
    """Return what to say where `path`, which is no folder, may have meant a model of the hub; pure."""
    text = os.fspath(path)
    return f", or, for the hub's model of that name, hf://{text}" if _HUB_ID.fullmatch(text) else ""


def resolve_file(folder: Path, name: str) -> Path | None:
    """Return the real path of the file `name` in `folder`, or None when there is no such file.

    Args:
        folder: A path that `resolve_folder` returned.
        name: One path component.

    Raises:
        CheckpointInvalid: The name or a link leads out of the folder, or it is not a regular file.
    """
    if name in {"", ".", ".."} or "/" in name or "\\" in name or not name.isprintable():
        raise CheckpointInvalid(
            f"{folder}: {name[:200]!r} is not the name of a file in the checkpoint's folder; "
            "the index is hostile or damaged, fetch the checkpoint again."
        )
    try:
        resolved = (folder / name).resolve(strict=True)
    except FileNotFoundError:
        if (folder / name).is_symlink():
            raise CheckpointInvalid(
                f"{folder / name} is a link to a file that does not exist; fetch it again."
            ) from None
        return None
    except (OSError, RuntimeError) as error:
        raise _unopened(folder / name, error) from error
    if not _may_lead_to(folder, resolved):
        raise CheckpointInvalid(
            f"{folder / name} is a link that leads out of the checkpoint, to {resolved}; "
            "put the file itself into the folder."
        )
    if not resolved.is_file():
        raise CheckpointInvalid(f"{folder / name} is not a regular file.")
    return resolved


def _unopened(path: Path, error: OSError | RuntimeError) -> CheckpointInvalid:
    if isinstance(error, PermissionError):
        return CheckpointInvalid(
            f"{path} cannot be opened: user {os.geteuid()}, as whom this process runs, lacks permission; let "
            "that user read the file and enter its folders."
        )
    reason = error.strerror if isinstance(error, OSError) else error
    return CheckpointInvalid(f"{path} cannot be opened: {reason}.")


def open_regular(path: Path) -> int:
    """Open a resolved path for reading and return the descriptor, which the caller closes.

    Raises:
        CheckpointInvalid: It became a link or something else than a file, or cannot be read.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except OSError as error:
        raise _unopened(path, error) from error
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise CheckpointInvalid(f"{path} is not a regular file.")
    return descriptor


def read_bounded(path: Path, *, limit_bytes: int) -> bytes:
    """Return the content of a resolved path.

    Raises:
        CheckpointInvalid: It is larger than `limit_bytes`, or cannot be read.
    """
    descriptor = open_regular(path)
    with open(descriptor, "rb") as file:  # noqa: PTH123 - a descriptor, not a path
        size = os.fstat(descriptor).st_size
        if size > limit_bytes:
            raise CheckpointInvalid(
                f"{path} has {format_bytes(size)}; such a file may have {format_bytes(limit_bytes)}: "
                "it is not what its name says."
            )
        data = file.read(size + 1)  # as much as there is, not as much as there may be: read takes it ahead
    if len(data) > size:
        raise CheckpointInvalid(f"{path} grew while it was read; wait until whoever writes it is done.")
    return data


def read_exactly(descriptor: int, buffer: memoryview, offset: int, *, where: str) -> None:
    """Fill `buffer` from `offset` of the file on; blocks.

    Raises:
        CheckpointInvalid: The file ends before, or the disk cannot read it.
    """
    done = 0
    while done < len(buffer):
        try:
            count = os.preadv(descriptor, [buffer[done:]], offset + done)
        except OSError as error:
            raise CheckpointInvalid(
                f"{where}: cannot be read at byte {offset + done:,}: {error.strerror}; fetch the file again."
            ) from error
        if count == 0:
            raise CheckpointInvalid(
                f"{where}: ends at byte {offset + done:,}, {len(buffer) - done:,} bytes too early; "
                "it was cut while in use, fetch it again."
            )
        done += count


def _may_lead_to(folder: Path, resolved: Path) -> bool:
    if resolved.is_relative_to(folder):
        return True
    in_hub_cache = folder.parent.name == "snapshots"
    return in_hub_cache and resolved.is_relative_to(folder.parent.parent / "blobs")
