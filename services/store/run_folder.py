"""One daemon per run folder: a lock that dies with the process, and its file removed on the way out."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from stoker.errors import ConfigError

LOCK_NAME = "store.lock"
SOCKET_NAME = "attach.sock"


class RunFolder:
    """A folder that this process owns until `close`."""

    def __init__(self, path: Path) -> None:
        """Make the folder where it is missing, and own it.

        Raises:
            ConfigError: Another daemon owns it, or it cannot be written.
        """
        self._lock_path = path / LOCK_NAME
        self.socket_path = path / SOCKET_NAME
        try:
            path.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._descriptor = self._locked()
        except BlockingIOError:
            raise ConfigError(
                f"{path} is in use by another checkpoint store (process {_owner(self._lock_path)}); "
                "stop it, or set STOKER_STORE_RUN_DIR to a folder of its own"
            ) from None
        except OSError as error:
            raise ConfigError(
                f"run folder {path} cannot be used: {error.strerror}; set STOKER_STORE_RUN_DIR"
            ) from error

    def close(self) -> None:
        """Let the folder go and remove the lock's file."""
        self._lock_path.unlink(missing_ok=True)
        os.close(self._descriptor)

    def _locked(self) -> int:
        """Return a descriptor that holds the lock on the file that has the lock's name now.

        The owner removes the file before it lets go, so a lock may be won on a file that is gone: try again.
        """
        while True:
            descriptor = os.open(self._lock_path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if _is_same_file(descriptor, self._lock_path):
                    os.ftruncate(descriptor, 0)
                    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
                    return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)


def _is_same_file(descriptor: int, path: Path) -> bool:
    try:
        named = path.stat()
    except FileNotFoundError:
        return False
    return os.path.samestat(os.fstat(descriptor), named)


def _owner(path: Path) -> str:
    try:
        return path.read_text().strip() or "unknown"
    except OSError:
        return "unknown"
