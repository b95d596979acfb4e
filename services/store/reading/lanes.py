"""One pool of threads per kind of transfer, so that a slow one never holds up a fast one.

Disk reads have few threads: a disk gains nothing from more. Far reads (peers, origins) have many, because a
round trip is long and one connection slow. Landings (writes of what arrived from afar) have their own, so
that a load never waits for the disk that its bytes go to. In each lane the urgent loads go first and loads of
one urgency take turns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import StrEnum
from time import monotonic

from services.store.reading.read_queue import ChunkLanding, ChunkRead, Outcome, Readers, Urgency

Job = ChunkRead | ChunkLanding


class Lane(StrEnum):
    """A kind of transfer."""

    DISK = "disk"
    FAR = "far"
    LANDING = "landing"


class Lanes:
    """The threads of all lanes."""

    def __init__(self, threads: Mapping[Lane, int], done: Callable[[Job, Outcome], None]) -> None:
        """Start them.

        Args:
            threads: How many per lane.
            done: Called from a thread after each job.
        """
        self._readers: dict[Lane, Readers[Job]] = {
            lane: Readers(count, done, name=lane.value) for lane, count in threads.items()
        }

    def add(self, lane: Lane, load: int, jobs: Iterable[Job], urgency: Urgency) -> None:
        """Queue jobs of a load."""
        self._readers[lane].add(load, jobs, urgency)

    def hurry(self, load: int) -> None:
        """Make a prefetch urgent in every lane."""
        for readers in self._readers.values():
            readers.hurry(load)

    def change(self, lane: Lane, load: int, changed: Callable[[Job], Sequence[Job]]) -> int:
        """Put other jobs in the place of each of a load that waits; returns how many more there are."""
        return self._readers[lane].change(load, changed)

    def drop_reads(self, load: int) -> int:
        """Forget the reads of a load that wait; returns how many will never run. Running ones go on."""
        return sum(readers.drop(load) for lane, readers in self._readers.items() if lane is not Lane.LANDING)

    def drop_landings(self, load: int) -> int:
        """Forget the landings of a load that wait, as `drop_reads`."""
        return self._readers[Lane.LANDING].drop(load)

    def waiting_bytes(self, lane: Lane) -> int:
        """Return the bytes of a lane's jobs that wait."""
        return self._readers[lane].waiting_bytes()

    def close(self, *, grace_seconds: float) -> None:
        """Let running jobs end within the grace, start no new one."""
        until = monotonic() + grace_seconds
        for readers in self._readers.values():
            readers.close(grace_seconds=max(0.0, until - monotonic()))
