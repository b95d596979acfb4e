"""A checker of what the state went through: from its whole history, each device had one owner at any time.

It knows only what docs/state.md promises, not how controllers keep it. Pure.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from stoker.state import Changes, Stored, Versioned


def violations(history: Iterable[Changes]) -> list[str]:
    """Return what was wrong in a history from the first revision on, in order; empty = nothing.

    1. A device slot is given only while it is free, and to a reservation made in the same transaction.
    2. It is freed only together with its owner's reservation.
    3. Reservations and devices change only while somebody leads; terms only grow.
    """
    replayed = _Replay()
    for changes in history:
        replayed.step(changes)
    return replayed.found


class _Replay:
    """The state as it stood after each revision."""

    def __init__(self) -> None:
        self.found: list[str] = []
        self._owners: dict[str, str] = {}
        self._reserved: dict[str, set[str]] = {}
        self._term = 0
        self._leads = False

    def step(self, changes: Changes) -> None:
        """Take one transaction."""
        at = f"revision {changes.revision}"
        stored = {change.key: change.item for change in changes.changes if isinstance(change, Stored)}
        deleted = {change.key for change in changes.changes if not isinstance(change, Stored)}
        if "leader" in stored:
            term = stored["leader"].create_revision
            if term < self._term:
                self.found.append(f"{at}: term {term} after term {self._term}")
            self._term, self._leads = term, True
        elif "leader" in deleted:
            self._leads = False
        self._give(at, _under("reservations/", stored), _under("devices/", stored))
        self._free(at, _names("reservations/", deleted), _names("devices/", deleted))
        if not self._leads and any(
            key.startswith(("reservations/", "devices/")) for key in (*stored, *deleted)
        ):
            self.found.append(f"{at}: written while nobody led")

    def _give(self, at: str, reservations: dict[str, bytes], devices: dict[str, bytes]) -> None:
        for replica_id, raw in reservations.items():
            record = json.loads(raw)
            self._reserved[replica_id] = {f"{record['node_id']}/{index}" for index in record["devices"]}
        for device, owner in devices.items():
            replica_id = owner.decode()
            if device in self._owners:
                self.found.append(f"{at}: {device} given to {replica_id}, {self._owners[device]} has it")
            if replica_id not in reservations or device not in self._reserved[replica_id]:
                self.found.append(f"{at}: {device} given to {replica_id}, which does not reserve it")
            self._owners[device] = replica_id

    def _free(self, at: str, reservations: set[str], devices: set[str]) -> None:
        self.found += [
            f"{at}: {device} freed while its owner keeps its reservation"
            for device in sorted(devices)
            if self._owners.pop(device, "") not in reservations
        ]
        self.found += [
            f"{at}: {owner} released and {device} is still its"
            for device, owner in self._owners.items()
            if owner in reservations
        ]
        for replica_id in reservations:
            self._reserved.pop(replica_id, None)


def _under(prefix: str, stored: Mapping[str, Versioned]) -> dict[str, bytes]:
    """Return the values of the keys below a prefix, by the rest of the key."""
    return {key.removeprefix(prefix): item.value for key, item in stored.items() if key.startswith(prefix)}


def _names(prefix: str, keys: Iterable[str]) -> set[str]:
    return {key.removeprefix(prefix) for key in keys if key.startswith(prefix)}
