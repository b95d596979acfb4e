"""What the host's network link carries at most: what a first transfer from a peer is predicted by.

Nothing is sent to measure it: a probe between hosts would compete with tokens, and say little while the other
host is busy. The kernel knows the speed of the link that the default route uses, and a tier that is paced
knows its pace. The first real transfer replaces this (`bandwidth`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from services.store.reading.pace import PacedTier

PAYLOAD_SHARE = 0.93
"""Of a link's rate that TCP's payload reaches: 10, 25 and 100 GbE carry 1.18, 2.9 and 11.5 GB/s."""
MOST_BYTES_PER_SECOND = 2.0e9
"""What one process sends and takes over TCP on two cores, whatever the link carries (DESIGN section 9)."""
_BYTES_PER_MEGABIT = 125_000
_ROUTES = Path("/proc/net/route")
_INTERFACES = Path("/sys/class/net")


def expected_rates(paced: Mapping[PacedTier, float], link_bytes_per_second: float | None) -> dict[str, float]:
    """Return what far tiers are expected to give before anything was moved, in bytes per second.

    Args:
        paced: Tiers made slower on purpose; 0 = not.
        link_bytes_per_second: Payload that the host's link carries; None = not known.
    """
    expected: dict[str, float] = {}
    for tier in (PacedTier.PEER, PacedTier.REMOTE):
        if paced.get(tier, 0.0) > 0:
            expected[tier] = paced[tier]
    if link_bytes_per_second is not None:  # an origin may be far slower than the link: nothing is said of it
        peer = min(link_bytes_per_second, MOST_BYTES_PER_SECOND)
        expected[PacedTier.PEER] = min(peer, expected.get(PacedTier.PEER, peer))
    return expected


def link_bytes_per_second(routes: Path = _ROUTES, interfaces: Path = _INTERFACES) -> float | None:
    """Return what payload the link of the default route carries; None where the kernel does not say.

    Reads two small files of the kernel; does not block.
    """
    try:
        name = default_interface(routes.read_text())
        megabits = int((interfaces / name / "speed").read_text()) if name else 0
    except (OSError, ValueError):
        return None
    return megabits * _BYTES_PER_MEGABIT * PAYLOAD_SHARE if megabits > 0 else None


def default_interface(routes: str) -> str | None:
    """Return the interface of the default route with the least metric, from the kernel's table."""
    found = []
    for line in routes.splitlines()[1:]:
        fields = line.split()
        if len(fields) > 7 and fields[1] == "00000000" == fields[7]:  # noqa: PLR2004 - columns of the table
            found.append((int(fields[6]), fields[0]))
    return min(found)[1] if found else None
