"""Write a folder so that it exists whole or not at all.

A conversion writes into `<dst>.partial-<random>` beside its destination and renames it at the end. It holds
a lock on that folder while it lives, so that the next one can tell what a dead one left from what a live
one is writing: a lock ends with its process, also by SIGKILL.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Self

from stoker.checkpoint.layout import PARTIAL_INFIX
from stoker.errors import AlreadyExists, DiskFull, InvalidRequest
from stoker.units import format_bytes

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import TracebackType

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW
_NOT_WRITABLE = frozenset(
    {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG}
)


class StagedFolder:
    """A folder under construction; a context manager that removes it unless it was published."""

    def __init__(self, destination: Path) -> None:
        self._destination = destination
        self.path, self._lock = _create_locked(destination)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._lock >= 0:
            shutil.rmtree(self.path, ignore_errors=True)
            os.close(self._lock)
            self._lock = -1

    def publish(self, *, replace: bool) -> None:
        """Make the folder appear at its destination, durably; afterwards nothing removes it.

        Args:
            replace: Whether what is at the destination may be removed. Between its removal and the new
                folder's appearance there is a moment with neither.

        Raises:
            AlreadyExists: Something is at the destination and may not be replaced.
        """
        os.fsync(self._lock)
        if replace and os.path.lexists(self._destination):
            with StagedFolder(self._destination) as old:
                self._destination.rename(old.path / "replaced")
                try:
                    self._appear()
                except BaseException:
                    (old.path / "replaced").rename(self._destination)
                    raise
        else:
            self._appear()
        _sync_folder(self._destination.parent)

    def _appear(self) -> None:
        try:
            self.path.rename(self._destination)
        except OSError as error:
            if error.errno not in {errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR}:
                raise
            raise AlreadyExists(
                f"{self._destination} appeared while it was being written; nothing was changed."
            ) from error
        os.close(self._lock)
        self._lock = -1


def remove_leftovers(destination: Path) -> None:
    """Remove what dead conversions to `destination` left.

    Raises:
        AlreadyExists: One is alive and writing the same destination.
    """
    prefix = destination.name + PARTIAL_INFIX
    for name in os.listdir(destination.parent):  # noqa: PTH208 - names are needed, not paths
        if not name.startswith(prefix):
            continue
        path = destination.parent / name
        try:
            lock = _lock(path)
        except BlockingIOError:
            raise AlreadyExists(
                f"Another conversion is writing {destination} (its work is in {path.name}); wait for it."
            ) from None
        except OSError:
            continue  # it vanished, or nobody can tell whether it is alive: leave it
        shutil.rmtree(path, ignore_errors=True)
        os.close(lock)


def check_space(folder: Path, *, need_bytes: int, destination: Path) -> None:
    """Refuse before the first byte what cannot fit.

    Raises:
        DiskFull: The file system of `folder` has less than `need_bytes` free for this user.
    """
    status = os.statvfs(folder)
    free_bytes = status.f_bavail * status.f_frsize
    if free_bytes < need_bytes:
        raise _disk_full(destination, need_bytes, f"{format_bytes(free_bytes)} are free")


@contextlib.contextmanager
def refusals_named(destination: Path, *, need_bytes: int) -> Iterator[None]:
    """Turn the system's refusals to write into errors that say what to do.

    Raises:
        DiskFull: No space, no quota, or over the size limit for files.
        InvalidRequest: The place cannot be written: rights, a read-only disk, a file where a folder must be.
    """
    try:
        yield
    except OSError as error:
        if error.errno in _FULL:
            raise _disk_full(destination, need_bytes, f"the system refused: {error.strerror}") from error
        if error.errno in _NOT_WRITABLE:
            raise InvalidRequest(
                f"Cannot write {destination}: {error.strerror} ({error.filename or destination}). "
                "Choose a folder that you may write."
            ) from error
        raise


def check_destination(destination: Path) -> None:
    """Refuse a name that would be taken for a leftover.

    Raises:
        InvalidRequest: The name is empty or contains the infix of partial folders.
    """
    if not destination.name or PARTIAL_INFIX in destination.name:
        raise InvalidRequest(f"{destination} cannot be a checkpoint's folder; choose another name.")


def _disk_full(destination: Path, need_bytes: int, why: str) -> DiskFull:
    return DiskFull(
        f"Not enough disk for {destination}: the checkpoint needs {need_bytes:,} bytes "
        f"({format_bytes(need_bytes)}), {why}. Free space or choose another disk; nothing was left behind.",
        details={"need_bytes": need_bytes},
    )


def _create_locked(destination: Path) -> tuple[Path, int]:
    """Create a partial folder and lock it; a cleaner may win the moment between, then try another name."""
    for _ in range(100):
        path = destination.parent / f"{destination.name}{PARTIAL_INFIX}{secrets.token_hex(4)}"
        path.mkdir()
        try:
            lock = _lock(path)
        except (BlockingIOError, FileNotFoundError):
            continue
        except OSError:
            return path, os.open(path, _FOLDER_FLAGS)  # a file system without locks: nobody will clean up
        if path.exists() and os.path.samestat(path.stat(), os.fstat(lock)):
            return path, lock
        os.close(lock)
    raise AlreadyExists(f"{destination}: its partial folders keep vanishing; is something cleaning up?")


def _lock(folder: Path) -> int:
    """Return a descriptor that holds the lock of `folder` until it is closed.

    Raises:
        BlockingIOError: Someone alive holds it.
        OSError: There is no such folder, or its file system has no locks (some network file systems).
    """
    descriptor = os.open(folder, _FOLDER_FLAGS)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
