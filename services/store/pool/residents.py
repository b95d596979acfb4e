"""Who is in the pool, on the way into it, in line for room, or gone and not settled. Decides nothing."""

from __future__ import annotations

import asyncio
import itertools

from services.store.catalog import CatalogEntry
from services.store.pool.eviction import Uses
from services.store.pool.occupancy import is_held
from services.store.pool.resident import Phase, Resident
from services.store.pool.window import Window
from services.store.reading.read_queue import Urgency
from stoker.clock import Clock


class Residents:
    """All residents of a pool; used from the event loop only.

    Attributes:
        pinned: Uris that stay.
    """

    def __init__(self, clock: Clock) -> None:
        """Make an empty one; call inside the running loop."""
        self.pinned: set[str] = set()
        self._clock = clock
        self._loop = asyncio.get_running_loop()
        self._keys = itertools.count(1)
        self._all: dict[int, Resident] = {}
        self._in_sight: dict[tuple[str, str], Resident] = {}
        self._waiting: list[Resident] = []

    def __len__(self) -> int:
        """Return how many take room or wait for it, also those that are gone and not settled."""
        return len(self._all)

    def __contains__(self, resident: Resident) -> bool:
        """Tell whether a resident is not settled yet."""
        return resident.key in self._all

    def __getitem__(self, key: int) -> Resident:
        """Return the resident of a key; KeyError when it is settled."""
        return self._all[key]

    def everyone(self) -> list[Resident]:
        """Return all, also those that are gone and not settled."""
        return list(self._all.values())

    def in_sight(self) -> list[Resident]:
        """Return those that can be asked for."""
        return list(self._in_sight.values())

    def find(self, identity: tuple[str, str]) -> Resident | None:
        """Return the one in sight of a uri and revision."""
        return self._in_sight.get(identity)

    def of_uri(self, uri: str) -> list[Resident]:
        """Return those in sight of a uri: one per revision."""
        return [each for each in self._in_sight.values() if each.entry.uri == uri]

    def window_to_join(self, identity: tuple[str, str]) -> Resident | None:
        """Return the window on a checkpoint of which nothing was given up yet."""
        for each in self._all.values():
            if each.window is not None and each.entry.identity == identity and each.window.may_join:
                return None if each.phase is Phase.GONE else each
        return None

    def add(
        self, entry: CatalogEntry, *, need_chunks: int, urgency: Urgency, window: Window | None = None
    ) -> Resident:
        """Make a resident that has no room yet, and put it in sight, but for a window."""
        now_seconds = self._clock.now_seconds()
        resident = Resident(
            key=next(self._keys),
            entry=entry,
            need_chunks=need_chunks,
            urgency=urgency,
            began_seconds=now_seconds,
            uses=Uses(count=0.0, at_seconds=now_seconds),
            last_used_unix_seconds=self._clock.unix_seconds(),
            mapped=self._loop.create_future(),
            done=self._loop.create_future(),
            window=window,
        )
        for future in (resident.mapped, resident.done):
            future.add_done_callback(_retrieve)
        self._all[resident.key] = resident
        if window is None:
            self._in_sight[entry.identity] = resident
        return resident

    def hide(self, resident: Resident) -> None:
        """Take one out of sight and out of the line; it may have room still."""
        if self._in_sight.get(resident.entry.identity) is resident:
            del self._in_sight[resident.entry.identity]
        if resident in self._waiting:
            self._waiting.remove(resident)

    def settle(self, resident: Resident) -> None:
        """Forget one that has given everything back."""
        del self._all[resident.key]

    def is_held(self, resident: Resident) -> bool:
        """Tell whether a resident must stay."""
        return is_held(resident, self.pinned)

    def held_chunks(self) -> int:
        """Return how many chunks cannot be had now."""
        return sum(each.chunk_count for each in self.everyone() if self.is_held(each))

    # --- the line of those who wait for room ---

    def queue(self, resident: Resident) -> None:
        """Put one in the line, the urgent first, then in the order of coming; idempotent."""
        if resident not in self._waiting:
            self._waiting.append(resident)
            self._waiting.sort(key=lambda each: (each.urgency, each.key))

    def next_in_line(self) -> Resident | None:
        """Take the first one out of the line."""
        return self._waiting.pop(0) if self._waiting else None

    def someone_waits(self, urgency: Urgency) -> bool:
        """Tell whether a newcomer of this urgency would overtake somebody."""
        return any(each.urgency <= urgency for each in self._waiting)


def _retrieve(future: asyncio.Future[None]) -> None:
    """Look at a failure, so that asyncio does not complain when nobody waited for it."""
    if not future.cancelled():
        future.exception()
