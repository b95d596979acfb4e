"""Which store daemon to ask: the one that was named, the one this host seems to run, or none."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from stoker.errors import PeerError

SOCKET_VARIABLE = "STOKER_ATTACH_SOCKET"
"""Names the attach socket for `daemon="auto"`; empty = no daemon."""

AUTO = "auto"


def find_socket(daemon: str | os.PathLike[str] | None) -> Path | None:
    """Return the attach socket to connect to, or None for none.

    Args:
        daemon: `auto` looks at `STOKER_ATTACH_SOCKET`, then at the store's default run folder; a path is
            the socket or the run folder that holds it; None asks nobody.

    Raises:
        PeerError: A daemon was named, and there is no socket.
    """
    if daemon is None:
        return None
    if daemon == AUTO:
        named = os.environ.get(SOCKET_VARIABLE)
        if named is not None:
            return _socket(Path(named)) if named else None
        return _trusted(_socket(Path(tempfile.gettempdir()) / "stoker"))
    path = _socket(Path(daemon))
    if not path.is_socket():
        raise PeerError(
            f"No store daemon listens on {path}: start one (`stoker up`), or pass daemon=None to load "
            "without one"
        )
    return path


def _socket(path: Path) -> Path:
    return path / "attach.sock" if path.is_dir() else path


def _trusted(path: Path) -> Path | None:
    """Return the socket if this user or root made it: anyone may write to the folder it is looked for in."""
    try:
        status = path.lstat()
    except OSError:
        return None
    return path if path.is_socket() and status.st_uid in {0, os.geteuid()} else None
