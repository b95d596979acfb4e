"""Ports nobody listens on, for services that are told theirs before they start.

A port that the kernel gives for 0 lies where it also takes those of outgoing connections from (Linux:
`net.ipv4.ip_local_port_range`, 32768 to 60999): between a look and the service's own `bind`, another
connection may have it. These lie below.
"""

from __future__ import annotations

import random
import socket
from contextlib import ExitStack
from pathlib import Path

EPHEMERAL_RANGE = Path("/proc/sys/net/ipv4/ip_local_port_range")
FIRST_PORT = 10_000
"""Below are the ports that well-known services have."""
ENOUGH_PORTS = 2_000
"""With fewer between the two, two commands that look at once may well choose the same."""


def free_ports(count: int, *, ephemeral_range: Path = EPHEMERAL_RANGE) -> list[int]:
    """Return `count` ports of 127.0.0.1 that nobody has, no two alike, below those of outgoing connections.

    Where the host leaves too few others, they are what the kernel gives for 0.

    Raises:
        OSError: There are none left.
    """
    candidates = _candidates(ephemeral_range)
    with ExitStack() as probes:
        return [_bound(probes.enter_context(socket.socket()), candidates) for _ in range(count)]


def _candidates(ephemeral_range: Path) -> list[int]:
    """Return ports to try, the last one first: in no order, so that two who look at once rarely meet."""
    try:
        first_ephemeral = int(ephemeral_range.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return []
    ports = range(FIRST_PORT, first_ephemeral)
    return random.SystemRandom().sample(ports, k=len(ports)) if len(ports) >= ENOUGH_PORTS else []


def _bound(probe: socket.socket, candidates: list[int]) -> int:
    while candidates:
        try:
            probe.bind(("127.0.0.1", candidates.pop()))
        except OSError:
            continue
        return int(probe.getsockname()[1])
    probe.bind(("127.0.0.1", 0))
    return int(probe.getsockname()[1])
