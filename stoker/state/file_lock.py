"""One owner per state file, across processes."""

from __future__ import annotations

import fcntl
import os
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stoker.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Generator
    from pathlib import Path


@contextmanager
def owned(path: Path) -> Generator[None, None, None]:
    """Own `path` while the block runs, by a lock on `<path>.lock` that dies with the process.

    The lock file stays: deleting it would let two owners lock two different files of one name.

    Raises:
        ConfigError: Somebody else owns it, or the folder cannot be written.
    """
    lock_path = path.with_name(path.name + ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(lock_path, os.O_RDWR | os.O_CREAT, 0o600)
    except OSError as error:
        raise ConfigError(
            f"state folder {path.parent} cannot be written ({error.strerror}): "
            "choose another data folder or grant access"
        ) from error
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
            raise ConfigError(
                f"state folder {path.parent} is in use by process {owner}: "
                "stop it, or give this one a data folder of its own"
            ) from None
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)
