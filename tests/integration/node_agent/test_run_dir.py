"""The folder of an agent's sockets, after one that was killed."""

from __future__ import annotations

import socket
from pathlib import Path

from services.node_agent.service import prepare_run_dir
from services.node_agent.workers.replica_workers import SOCKET_SUFFIX, STORE_SUFFIX
from services.node_agent.workers.session_socket import SUFFIX

SUFFIXES = (".sock", SUFFIX, SOCKET_SUFFIX, STORE_SUFFIX)


def listener(path: Path) -> socket.socket:
    bound = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    bound.bind(str(path))
    bound.listen(1)
    return bound


def test_what_the_killed_left_goes(tmp_path: Path) -> None:
    for worker in ("worker-1-a", "worker-2-b"):
        for suffix in SUFFIXES[1:]:
            (tmp_path / worker).with_suffix(suffix).touch()
    listener(tmp_path / "worker-1-a.sock").close()

    with listener(tmp_path / "worker-2-b.sock"):
        prepare_run_dir(tmp_path)

    assert {path.name for path in tmp_path.iterdir()} == {f"worker-2-b{suffix}" for suffix in SUFFIXES}
